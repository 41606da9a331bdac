"""What the foreground policy promises: the counts of the region policy, air last, and the second map as the only thing it reads more."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mwm.masking import ForegroundPolicy, create_policy, policy_from_dict, split_maps, survey_regions

GRID = (7, 7)
GOLDEN = [
    "0110011111100001000011011101100001110000010100110",
    "0001001001000010000100011001001110100110100001010",
    "0000101000000101000100010000001000010100101000000",
]
REGION = {"high": 0.8, "low": 0.4, "empty_share": 0.5}


def maps(count: int = 60) -> torch.Tensor:
    """Regions of every size, foregrounds of every size. bool [count, 2, 7, 7]"""
    draw = torch.rand(count, 2, 7, 7, generator=torch.Generator().manual_seed(5))
    sizes = torch.stack([torch.linspace(0, 1, count), torch.linspace(1, 0, count).roll(17)], 1)
    return draw < sizes[:, :, None, None]


def request(count: int = 60, epoch: int = 0, view: int = 0) -> dict:
    return {"grid": GRID, "seed": 11, "ids": torch.arange(count) * 977, "epoch": epoch, "view": view}


def hidden_of(active: torch.Tensor) -> torch.Tensor:
    return (~active).flatten(1).sum(1)


@pytest.mark.parametrize("match", [("region", REGION), ("region", {"high": 0.7, "low": 0.3, "empty": "low"}), ("region", {"overall": 0.6}), ("uniform", {"mask_ratio": 0.6})])
def test_as_many_patches_as_the_matched_policy_image_by_image_and_air_only_where_it_must_be(match: tuple[str, dict]) -> None:
    other = create_policy(match[0], **match[1])
    policy = create_policy("foreground", match=other)
    both = maps()
    into_air = 0
    for epoch in range(8):
        for view in (0, 1):
            active = policy(both, **request(epoch=epoch, view=view))
            assert torch.equal(hidden_of(active), hidden_of(other(both[:, 0], **request(epoch=epoch, view=view))))
            fore = both[:, 1]
            in_air = (~active & ~fore).flatten(1).sum(1)
            assert torch.equal(in_air, (hidden_of(active) - fore.flatten(1).sum(1)).clamp(min=0))
            into_air += int((in_air > 0).sum())
    assert 0 < into_air < 8 * 2 * 60  # both cases occurred
    assert policy.visible(GRID) == other.visible(GRID)


def test_every_foreground_patch_is_hidden_alike_wherever_the_region_is() -> None:
    both = torch.zeros(200, 2, 7, 7, dtype=torch.bool)
    both[:, 0, 1:3, 1:3] = True
    both[:, 1, :5, :6] = True
    policy = create_policy("foreground", match=create_policy("region", **REGION))
    hidden = torch.cat([~policy(both, **request(200, epoch)) for epoch in range(20)]).double().mean(0)
    expected = (4 * 0.8 + 45 * 0.4) / 30
    assert (hidden[:5, :6] - expected).abs().max() < 5 * (expected * (1 - expected) / 4000) ** 0.5
    assert not hidden[5:].any() and not hidden[:, 6:].any()


def test_mask_is_a_pure_function_and_each_map_matters() -> None:
    policy, both = create_policy("foreground", match=create_policy("region", **REGION)), maps()
    active = policy(both, **request())
    assert torch.equal(active, policy(both, **request()))
    order = torch.randperm(60)
    turned = policy(both[order], **{**request(), "ids": request()["ids"][order]})
    assert torch.equal(turned, active[order])
    for k in (0, 30, 59):
        assert torch.equal(policy(both[k : k + 1], **{**request(), "ids": [977 * k]})[0], active[k])
    assert not torch.equal(active, policy(both.flip(1), **request()))
    assert not torch.equal(active, policy(both, **request(epoch=1)))
    assert torch.equal(policy_from_dict(policy.to_dict())(both, **request()), active)


def test_pixels_and_inside_grids_give_the_same_masks() -> None:
    pixels = torch.nn.functional.interpolate(torch.rand(9, 2, 14, 14, generator=torch.Generator().manual_seed(1)).round(), 112)
    policy = create_policy("foreground", match=create_policy("region", **REGION))
    grids = policy.inside(pixels, GRID)
    assert grids.shape == (9, 2, 7, 7) and grids.dtype == torch.bool
    assert torch.equal(policy(grids, **request(9)), policy(pixels, **request(9)))
    assert torch.equal(survey_regions(pixels, GRID).inside, grids[:, 0])


@pytest.mark.parametrize("name", ["region", "uniform"])
def test_other_policies_read_the_first_map_only(name: str) -> None:
    region = create_policy("region", **REGION)
    policy = region if name == "region" else create_policy("uniform", match=region)
    both = maps()
    assert torch.equal(policy(both, **request()), policy(both[:, 0], **request()))
    soft = dataclasses.replace(region, soft=True)
    pixels = torch.rand(5, 2, 28, 28)
    assert torch.equal(soft(pixels, **request(5)), soft(pixels[:, 0], **request(5)))


def test_masks_equal_those_of_the_first_version() -> None:
    """A difference here breaks the resume of runs that were started before."""
    both = maps()[[20, 40, 55]]
    active = create_policy("foreground", match=create_policy("region", **REGION))(both, grid=GRID, seed=3, ids=[0, 7, 2**32 - 1], epoch=2)
    assert ["".join("01"[int(patch)] for patch in mask.flatten()) for mask in active] == GOLDEN


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda: create_policy("foreground", match="region"), "match must be a policy"),
        (lambda: ForegroundPolicy(match=ForegroundPolicy()), "got another foreground policy"),
        (lambda: create_policy("foreground")(torch.rand(1, 3, 7, 7), **request(1)), r"\[B, 2, H, W\] with the foreground"),
        (lambda: create_policy("foreground")(None, **request(1)), "got None"),
        (lambda: create_policy("foreground")(torch.full((1, 2, 7, 7), float("nan")), **request(1)), "NaN"),
        (lambda: split_maps(torch.rand(1, 1, 7, 7)), "Drop the channel dimension"),
    ],
)
def test_bad_arguments_end_in_one_sentence(act: object, sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence) as caught:
        act()
    assert "\n" not in str(caught.value)
