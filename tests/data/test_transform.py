"""Crops and flips: image and region stay together; everything is a pure function of (seed, id, epoch, view)."""

from __future__ import annotations

import pytest
import torch

from mwm.data import DataError, EpochSampler, JointTransform

WHERE = {"seed": 3, "id": 77, "epoch": 5}


@pytest.mark.parametrize("size", [(24, 24), (16, 40), (64, 64)])
def test_a_region_drawn_from_the_image_stays_equal_to_it(size: tuple[int, int]) -> None:
    image = torch.rand(1, 37, 53)
    for epoch in range(12):
        moved, region = JointTransform(size, (0.2, 1.0))(image, image[0], seed=1, id=9, epoch=epoch)
        assert moved.shape == (1, *size) and torch.equal(moved[0].clamp(0, 1), region)


def test_the_same_arguments_give_the_same_view_and_any_other_argument_another() -> None:
    transform = JointTransform(16, (0.2, 0.8))
    image = torch.rand(2, 30, 30)
    first = transform(image, image[0], **WHERE)[0]
    torch.rand(5)  # torch's own generator plays no part
    assert torch.equal(first, transform(image, image[0], **WHERE)[0])
    for change in ({"seed": 4}, {"id": 78}, {"epoch": 6}, {"view": 1}):
        assert not torch.equal(first, transform(image, image[0], **{**WHERE, **change})[0])


def test_boxes_stay_inside_and_have_the_area_and_ratio_asked_for() -> None:
    transform = JointTransform(8, (0.3, 0.6), (0.8, 1.25))
    shares, ratios, tops, flips = [], [], [], 0
    for k in range(3000):
        top, left, height, width, flipped = transform.box(200, 100, seed=0, id=k, epoch=0)
        assert top >= 0 and left >= 0 and top + height <= 200 and left + width <= 100
        shares.append(height * width / 20000)
        ratios.append((width / 100) / (height / 200))
        tops.append(top / max(1, 200 - height))
        flips += flipped
    assert 0.29 < min(shares) < 0.32 and 0.58 < max(shares) < 0.61 and abs(sum(shares) / 3000 - 0.45) < 0.01
    assert 0.78 < min(ratios) < 0.83 and 1.2 < max(ratios) < 1.28
    assert abs(sum(tops) / 3000 - 0.5) < 0.02 and abs(flips / 3000 - 0.5) < 0.03


def test_without_crop_and_flip_the_image_is_only_resized() -> None:
    image = torch.rand(1, 20, 20)
    moved, region = JointTransform(20, (1, 1), flip=False)(image, None, **WHERE)
    assert torch.equal(moved, image) and region is None
    assert {JointTransform(20, (1, 1)).box(20, 20, seed=0, id=k, epoch=0) for k in range(50)} == {(0, 0, 20, 20, False), (0, 0, 20, 20, True)}


def test_a_flip_mirrors_both() -> None:
    image = torch.rand(1, 10, 12)
    flipped = [JointTransform((10, 12), (1, 1))(image, image[0], seed=0, id=k, epoch=0)[0] for k in range(20)]
    assert any(torch.equal(f, image.flip(-1)) for f in flipped) and any(torch.equal(f, image) for f in flipped)


def test_regions_of_another_size_and_wrong_ranges_are_refused() -> None:
    with pytest.raises(DataError, match=r"region must be \[4, 4\]"):
        JointTransform(4)(torch.rand(1, 4, 4), torch.rand(4, 5), **WHERE)
    for arguments in ({"crop_scale": (0, 1)}, {"crop_scale": (0.8, 0.5)}, {"crop_scale": (0.5, 1.5)}, {"crop_ratio": (0, 1)}, {"size": 0}):
        with pytest.raises(DataError):
            JointTransform(**{"size": 8, **arguments})


def test_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    orders = {(seed, epoch): tuple(EpochSampler(101, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert all(sorted(order) == list(range(101)) for order in orders.values()) and len(set(orders.values())) == 4
    torch.manual_seed(5)
    assert tuple(EpochSampler(101, seed=0, epoch=0)) == orders[0, 0]


def test_places_are_uniform() -> None:
    counts = torch.zeros(6, 6)
    for epoch in range(1200):
        for place, index in enumerate(EpochSampler(6, seed=0, epoch=epoch)):
            counts[place, index] += 1
    assert ((counts - 200).square() / 200).sum() < 25 + 5 * 50**0.5  # chi-square with 25 degrees of freedom


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_the_epoch_without_overlap_and_drop_the_rest(world: int) -> None:
    whole = list(EpochSampler(17, seed=0, epoch=2))
    parts = [list(EpochSampler(17, seed=0, epoch=2, rank=r, world_size=world)) for r in range(world)]
    assert {len(part) for part in parts} == {17 // world}
    assert [parts[k % world][k // world] for k in range(17 - 17 % world)] == whole[: 17 - 17 % world]


def test_start_continues_where_a_run_was_cut() -> None:
    whole = list(EpochSampler(17, seed=0, epoch=2, rank=1, world_size=2))
    sampler = EpochSampler(17, seed=0, epoch=2, start=3, rank=1, world_size=2)
    assert list(sampler) == whole[3:] and len(sampler) == len(whole) - 3
    assert next(iter(EpochSampler(3, seed=0, epoch=4, keyed=True)))[0] == 4
    assert list(EpochSampler(0, seed=0, epoch=0)) == []
    with pytest.raises(DataError, match="rank below world_size"):
        EpochSampler(5, seed=0, epoch=0, rank=2, world_size=2)
