"""What the region policy promises: exact expectations, exact counts, and empty regions that do not tell the label."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mwm.masking import PRESETS, create_policy

GRID = (7, 7)


def inside_of(*counts: int) -> torch.Tensor:
    """Inside grids with the given numbers of region patches. bool [B, 7, 7]"""
    return (torch.arange(49) < torch.tensor(counts)[:, None]).reshape(-1, 7, 7)


def hide(policy: Callable, inside: torch.Tensor, epochs: int, grid: tuple[int, int] = GRID) -> torch.Tensor:
    """Hidden patches over many epochs. bool [epochs, B, Gh, Gw]"""
    ids = torch.arange(len(inside))
    return torch.stack([~policy(inside, grid=grid, seed=1, ids=ids, epoch=epoch) for epoch in range(epochs)])


@pytest.mark.parametrize("preset", PRESETS)
def test_each_patch_is_hidden_with_its_own_share(preset: str) -> None:
    """Over images and epochs, each of the 49 patches within 5 sigma of `high` or `low`: no flooring, no place bias."""
    high, low = PRESETS[preset]
    inside = inside_of(*[11] * 40)
    hidden = hide(create_policy("region", preset=preset), inside, epochs=150).flatten(0, 1)
    share = hidden.double().mean(0)
    expected = torch.where(inside[0], high, low)
    sigma = (expected * (1 - expected) / len(hidden)).sqrt()
    assert ((share - expected).abs() <= 5 * sigma).all()


def test_counts_of_a_stratum_are_floor_or_one_more() -> None:
    inside = inside_of(11, 7, 1)
    hidden = hide(create_policy("region", high=0.8, low=0.4), inside, epochs=200)
    for index, count in enumerate((11, 7, 1)):
        for mask, share, patches in ((inside[index], 0.8, count), (~inside[index], 0.4, 49 - count)):
            counts = (hidden[:, index] & mask).flatten(1).sum(1)
            assert set(counts.tolist()) == {int(patches * share), int(patches * share) + 1}


def test_the_shipped_default_is_the_papers_first_preset() -> None:
    assert create_policy("region") == create_policy("region", high=0.8, low=0.4) == create_policy("region", preset="0.8/0.4")


@pytest.mark.parametrize("overall", [0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 0.95])
@pytest.mark.parametrize("high", [0.0, 0.5, 0.8, 0.99])
def test_overall_hides_the_same_exact_count_in_every_image(overall: float, high: float) -> None:
    policy = create_policy("region", overall=overall, high=high)
    total = round(overall * 49)
    counts = (0, 1, 5, 11, 25, 44, 48, 49)
    inside = inside_of(*counts)
    hidden = hide(policy, inside, epochs=25)
    assert (hidden.flatten(2).sum(2) == total).all()
    assert policy.visible(GRID) == 49 - total
    hidden_inside = (hidden & inside).flatten(2).sum(2)
    for index, n_in in enumerate(counts):
        least, most = max(0, total - (49 - n_in)), min(n_in, total)
        allowed = {min(max(int(n_in * high) + extra, least), most) for extra in (0, 1)}
        assert set(hidden_inside[:, index].tolist()) <= allowed


def test_overall_hides_region_patches_at_high_on_average() -> None:
    inside = inside_of(*[11] * 200)
    hidden = hide(create_policy("region", overall=0.5, high=0.8), inside, epochs=20)
    share = (hidden & inside).double().sum((2, 3)).mean() / 11
    sigma = (0.8 * 0.2) ** 0.5 / 11 / (200 * 20) ** 0.5
    assert abs(share - 0.8) <= 5 * sigma


def test_empty_regions_are_hidden_at_the_mean_share_of_the_others() -> None:
    """Otherwise the hidden share would tell which images have a finding."""
    inside = inside_of(*range(1, 40), *[0] * 39)
    policy = create_policy("region", high=0.8, low=0.4)
    share = policy.mean_share(inside)
    assert share == pytest.approx(sum(0.8 * n + 0.4 * (49 - n) for n in range(1, 40)) / 39 / 49, abs=1e-12)
    hidden = hide(policy.with_empty_share(share), inside, epochs=60).flatten(2).double().mean(2)
    sigma = 0.5 / 49 / (39 * 60) ** 0.5
    assert abs(hidden[:, 39:].mean() - hidden[:, :39].mean()) <= 5 * 2**0.5 * sigma
    spread = hide(policy.with_empty_share(share), inside[39:], epochs=200).double().mean((0, 1))
    assert ((spread - share).abs() <= 5 * 0.5 / (39 * 200) ** 0.5).all()  # uniformly, everywhere


def test_empty_share_is_a_pure_function_of_the_set_not_of_its_order() -> None:
    inside = inside_of(*range(0, 50))
    policy = create_policy("region", high=0.7, low=0.3)
    assert policy.mean_share(inside) == policy.mean_share(inside.flip(0)) == policy.mean_share(inside[1:])


def test_empty_low_hides_at_low_and_empty_error_refuses() -> None:
    inside = inside_of(0, 10)
    hidden = hide(create_policy("region", high=0.75, low=0.25, empty="low"), inside, epochs=400)[:, 0]
    assert abs(hidden.double().mean() - 0.25) < 5 * 0.5 / 49 / 400**0.5
    with pytest.raises(ValueError, match="1 of 2 regions"):
        hide(create_policy("region", empty="error"), inside, epochs=1)
    with pytest.raises(ValueError, match="1 of 2 regions"):
        hide(create_policy("region", overall=0.5, empty="error"), inside, epochs=1)


def test_empty_region_without_a_share_is_refused_not_guessed() -> None:
    with pytest.raises(ValueError, match=r"with_empty_share\(policy.mean_share"):
        hide(create_policy("region"), inside_of(3, 0), epochs=1)
    hide(create_policy("region"), inside_of(3, 4), epochs=1)


def test_prompt_that_matches_nothing_has_no_mean_share() -> None:
    with pytest.raises(ValueError, match="Change the prompt"):
        create_policy("region").mean_share(inside_of(0, 0))


def test_small_region_claims_a_patch_whatever_min_cover() -> None:
    region = torch.zeros(1, 224, 224)
    region[0, 100:106, 100:106] = 1
    inside = create_policy("region", min_cover=1.0).inside(region, GRID)
    assert inside.sum() == 1 and inside[0, 3, 3]


def test_min_cover_decides_by_area_not_by_one_pixel() -> None:
    region = torch.zeros(1, 64, 64)
    region[0, :, :40] = 1  # the second column of patches is covered by a quarter
    assert create_policy("region", min_cover=0.25).inside(region, (2, 2)).all()
    assert create_policy("region", min_cover=0.26).inside(region, (2, 2)).sum() == 2


def test_soft_prefers_well_covered_patches_and_keeps_the_counts() -> None:
    region = torch.zeros(1, 224, 224)
    region[0, :64, :] = torch.linspace(1, 0.3, 224)  # all of these 14 patches are inside, with falling coverage
    policy = create_policy("region", high=0.5, low=0.0, soft=True)
    hidden = torch.stack([~policy(region, grid=GRID, seed=0, ids=[5], epoch=epoch)[0] for epoch in range(300)]).double()
    assert (hidden.sum((1, 2)) == 7).all()
    columns = hidden[:, :2].mean((0, 1))
    assert columns[0] - columns[6] > 0.2
    hard = create_policy("region", high=0.5, low=0.0)
    flat = torch.stack([~hard(region, grid=GRID, seed=0, ids=[5], epoch=epoch)[0] for epoch in range(300)]).double()[:, :2].mean((0, 1))
    assert (flat - 0.5).abs().max() < 5 * 0.5 / 600**0.5


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"high": 1.0, "low": 0.4}, r"high must be in \[0, 1\), got 1.0"),
        ({"high": 0.8, "low": -0.1}, r"low must be in \[0, 1\), got -0.1"),
        ({"overall": 1.0}, r"overall must be in \[0, 1\)"),
        ({"overall": float("nan")}, r"overall must be in \[0, 1\)"),
        ({"high": "0.8", "low": 0.4}, "high must be a number"),
        ({"high": True, "low": 0.4}, "high must be a number"),
        ({"high": 0.4, "low": 0.8}, "Swap them"),
        ({"high": 0.8}, "given together"),
        ({"overall": 0.5, "low": 0.2}, "leave low out"),
        ({"preset": ["0.8/0.4"]}, "preset must be one of 0.8/0.4, 0.7/0.3, 0.6/0.2"),
        ({"preset": "0.9/0.1"}, "preset must be one of 0.8/0.4, 0.7/0.3, 0.6/0.2"),
        ({"preset": "0.8/0.4", "high": 0.9}, "preset must be given alone"),
        ({"empty": "drop"}, "empty must be one of mean, low, error"),
        ({"overall": 0.5, "empty": "low"}, "same count"),
        ({"min_cover": 0}, r"min_cover must be in \(0, 1\]"),
        ({"empty_share": 1.5}, r"empty_share must be in \[0, 1\)"),
        ({"hihg": 0.8}, "got hihg"),
    ],
)
def test_bad_settings_end_in_one_sentence(settings: dict, sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence) as caught:
        create_policy("region", **settings)
    assert "\n" not in str(caught.value)


def test_unknown_policy_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="region, uniform, got 'blocks'"):
        create_policy("blocks")


@pytest.mark.parametrize("settings", [{"high": 0.8, "low": 0.4, "empty_share": 0.55}, {"high": 0.7, "low": 0.3, "empty": "low", "min_cover": 0.6}, {"overall": 0.6}])
def test_the_one_launch_of_a_gpu_draws_the_masks_of_the_steps(settings: dict) -> None:
    policy = create_policy("region", **settings)
    region, ids = torch.rand(20, 28, 42), torch.randint(0, 2**32, (20,))
    region[:, :, 20:] = 0
    region[::4] = 0  # empty ones
    request = {"seed": 2**63 + 1, "epoch": 4, "view": 2}
    assert policy._one_launch_draws(region, (4, 6), ids)
    assert torch.equal(policy._draw_at_once(region, (4, 6), ids=ids, **request), policy(region, grid=(4, 6), ids=ids, **request))


def test_what_the_one_launch_cannot_draw_is_left_to_the_steps() -> None:
    region, ids = torch.rand(2, 8, 8), torch.arange(2)
    for settings in ({"high": 0.8, "low": 0.4}, {"overall": 0.6, "empty": "error"}, {"overall": 0.6, "soft": True}):
        assert not create_policy("region", **settings)._one_launch_draws(region, (2, 2), ids)
    policy = create_policy("region", overall=0.6)
    assert policy._one_launch_draws(region, (2, 2), ids)
    for other, grid, some in ((region > 0.5, (2, 2), ids), (region, (3, 2), ids), (region, (2, 4), ids), (region[0], (2, 2), ids), (region, (2, 2), ids[:1])):
        assert not policy._one_launch_draws(other, grid, some)
