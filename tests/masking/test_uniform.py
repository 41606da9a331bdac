"""What the uniform policy promises, above all the fair comparison by `match`."""

from __future__ import annotations

import pytest
import torch

from mwm.masking import create_policy

GRID = (7, 7)


def inside_grids(count: int = 60) -> torch.Tensor:
    return torch.rand(count, 7, 7, generator=torch.Generator().manual_seed(5)) < torch.linspace(0, 1, count)[:, None, None]


@pytest.mark.parametrize("settings", [{"high": 0.8, "low": 0.4, "empty_share": 0.53}, {"high": 0.6, "low": 0.2, "empty": "low"}, {"overall": 0.6}])
def test_match_hides_as_many_patches_as_the_other_policy_image_by_image_and_epoch_by_epoch(settings: dict) -> None:
    other = create_policy("region", **settings)
    uniform = create_policy("uniform", match=other)
    inside = inside_grids()
    counts = set()
    for epoch in range(10):
        for view in (0, 1):
            request = {"grid": GRID, "seed": 11, "ids": torch.arange(60) * 977, "epoch": epoch, "view": view}
            a, b = other(inside, **request), uniform(inside, **request)
            assert torch.equal(a.flatten(1).sum(1), b.flatten(1).sum(1))
            counts |= set(a.flatten(1).sum(1).tolist())
            assert not torch.equal(a, b)
    assert len(counts) > 5 or "overall" in settings
    assert uniform.visible(GRID) == other.visible(GRID)


def test_match_hides_inside_and_outside_alike() -> None:
    inside = torch.zeros(200, 7, 7, dtype=torch.bool)
    inside[:, 1:4, 2:6] = True
    policy = create_policy("uniform", match=create_policy("region", high=0.8, low=0.4))
    hidden = torch.cat([~policy(inside, grid=GRID, seed=0, ids=torch.arange(200), epoch=epoch) for epoch in range(20)]).double().mean(0)
    expected = (12 * 0.8 + 37 * 0.4) / 49
    assert (hidden - expected).abs().max() < 5 * (expected * (1 - expected) / 4000) ** 0.5


def test_match_passes_the_empty_share_on() -> None:
    policy = create_policy("uniform", match=create_policy("region")).with_empty_share(0.25)
    assert policy.match.empty_share == 0.25
    empty = torch.zeros(1, 7, 7, dtype=torch.bool)
    assert abs(int((~policy(empty, grid=GRID, seed=0, ids=[1], epoch=0)).sum()) - 0.25 * 49) <= 1


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.49, 0.6, 0.75, 0.99])
def test_each_patch_is_hidden_with_the_ratio_no_flooring(ratio: float) -> None:
    policy = create_policy("uniform", mask_ratio=ratio)
    hidden = torch.cat([~policy(None, grid=GRID, seed=2, ids=torch.arange(500), epoch=epoch) for epoch in range(10)])
    counts = hidden.flatten(1).sum(1)
    assert set(counts.tolist()) <= {int(ratio * 49), int(ratio * 49) + 1}
    share = hidden.double().mean(0)
    assert (share - ratio).abs().max() <= 5 * (ratio * (1 - ratio) / 5000) ** 0.5
    assert abs(share.mean() - ratio) <= 5 * 0.5 / 49 / 5000**0.5


def test_visible_is_given_only_where_no_coin_decides() -> None:
    assert create_policy("uniform", mask_ratio=0.75).visible((4, 4)) == 4
    assert create_policy("uniform", mask_ratio=0.75).visible(GRID) is None
    assert create_policy("uniform", mask_ratio=0.0).visible(GRID) == 49
    assert create_policy("uniform", overall=0.75).visible(GRID) == 49 - round(0.75 * 49)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \[0, 1\), got 1.0"),
        ({"mask_ratio": -0.2}, r"mask_ratio must be in \[0, 1\)"),
        ({"mask_ratio": "high"}, "must be a number"),
        ({"mask_ratio": 0.5, "overall": 0.5}, "exactly one of"),
        ({"match": "region"}, "match must be a policy"),
        ({"high": 0.8}, "got high"),
    ],
)
def test_bad_settings_end_in_one_sentence(settings: dict, sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence) as caught:
        create_policy("uniform", **settings)
    assert "\n" not in str(caught.value)
