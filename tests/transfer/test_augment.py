"""Crops and flips are pure functions of (seed, epoch, id), move masks and boxes alike, and cover the shares they say."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mwm.transfer.augment import Augment, move_boxes, warp


def test_a_draw_depends_on_seed_epoch_and_id_alone() -> None:
    augment = Augment(0.5, True, 7)
    ids = torch.tensor([4, 17, 2**32 - 1, 0])
    theta = augment.theta(3, ids)
    assert torch.equal(theta[[2, 0]], augment.theta(3, ids[[2, 0]]))
    assert torch.equal(theta, augment.theta(3, ids.tolist()))
    for other in (augment.theta(4, ids), Augment(0.5, True, 8).theta(3, ids), augment.theta(3, ids + torch.tensor([1, 1, -1, 1]))):
        assert not torch.isclose(theta[:, 0, 2], other[:, 0, 2]).any()


def test_crops_lie_inside_the_image_and_cover_the_shares_of_the_setting() -> None:
    theta = Augment(0.4, True, 0).theta(0, range(4000))
    side = theta[:, 1, 1]
    assert torch.equal(theta[:, 0, 0].abs(), side)
    assert 0.4 <= float(side.square().min()) < 0.41 and 0.99 < float(side.square().max()) <= 1
    assert float(side.square().mean()) == pytest.approx(0.7, abs=0.01)
    assert float((theta[:, :, 2].abs() + side[:, None]).max()) <= 1 + 1e-6
    assert float((theta[:, 0, 0] < 0).float().mean()) == pytest.approx(0.5, abs=0.03)
    assert float(theta[:, :, 2].mean()) == pytest.approx(0, abs=0.01)
    assert (Augment(0.4, False, 0).theta(0, range(50))[:, 0, 0] > 0).all()


def test_no_crop_and_no_flip_change_nothing() -> None:
    images = torch.rand(3, 2, 9, 14)
    assert not Augment().moves
    assert torch.allclose(warp(images, Augment().theta(5, [1, 2, 3])), images, atol=1e-5)


def test_a_known_crop_equals_cutting_and_resizing_and_a_flip_mirrors() -> None:
    images = torch.rand(1, 1, 32, 32)
    theta = torch.tensor([[[0.5, 0.0, -0.25], [0.0, 0.5, 0.5]]])  # columns 4 … 20, rows 16 … 32
    cut = F.interpolate(images[..., 16:32, 4:20], (32, 32), mode="bilinear", align_corners=False)
    moved = warp(images, theta)
    assert torch.allclose(moved[..., 1:-1, 1:-1], cut[..., 1:-1, 1:-1], atol=1e-5)  # at a cut's border a warp sees the pixels beyond it
    mirrored = theta.clone()
    mirrored[:, 0, 0] *= -1
    assert torch.allclose(warp(images, mirrored), moved.flip(-1), atol=1e-5)


def test_boxes_follow_the_pixels_they_hold() -> None:
    size = (64, 96)
    for k, theta in enumerate(Augment(0.5, True, 1).theta(0, range(30))):
        x0, y0 = 20 + k, 15 + k % 7
        mask = torch.zeros(1, 1, *size)
        mask[..., y0 : y0 + 20, x0 : x0 + 24] = 1
        seen = warp(mask, theta[None], mode="nearest")[0, 0].nonzero()
        moved = move_boxes(torch.tensor([[x0, y0, x0 + 24, y0 + 20]], dtype=torch.float32), theta, size)[0]
        expected = torch.tensor([seen[:, 1].min(), seen[:, 0].min(), seen[:, 1].max() + 1, seen[:, 0].max() + 1], dtype=torch.float32)
        assert (moved - expected).abs().max() <= 1
