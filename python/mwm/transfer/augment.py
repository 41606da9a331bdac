"""Crops and flips of a whole batch on its device, each a pure function of (seed, epoch, id of the image)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mwm.ops import random_words

STREAM = 48
"""Stream of the random words for crops and flips of fine-tuning."""


@dataclass(frozen=True)
class Augment:
    """A random crop of the image's shape, sized back, and a flip.

    A crop covers a share of the area drawn uniformly from [crop, 1], at a place drawn uniformly.

    Attributes:
        crop: Least share of the area; 1 = none.
        flip: Whether to flip half of the images left to right.
        seed: Of the draws.
    """

    crop: float = 1.0
    flip: bool = False
    seed: int = 0

    @property
    def moves(self) -> bool:
        """Whether anything is drawn."""
        return self.crop < 1 or self.flip

    def theta(self, epoch: int, ids: Tensor | Sequence[int]) -> Tensor:
        """Where each output pixel looks, as `torch.nn.functional.affine_grid` takes it: (x, y) of the image, in [-1, 1], from (x, y, 1) of the output.

        Args:
            epoch: From 0.
            ids: Integers in [0, 2³²), one per image. B

        Returns:
            float32 [B, 2, 3] on the CPU
        """
        draws = random_words(self.seed, torch.as_tensor(ids, dtype=torch.int64).cpu(), epoch, 0, STREAM, 4).double() / 2**32
        side = (self.crop + (1 - self.crop) * draws[:, 0]).sqrt()
        theta = torch.zeros(len(draws), 2, 3, dtype=torch.float64)
        theta[:, 0, 0] = torch.where((draws[:, 3] < 0.5) & self.flip, -side, side)
        theta[:, 1, 1] = side
        theta[:, :, 2] = (1 - side)[:, None] * (2 * draws[:, 1:3] - 1)
        return theta.float()


def warp(images: Tensor, theta: Tensor, *, mode: str = "bilinear") -> Tensor:
    """Sample images at the places that theta names.

    Args:
        images: float [B, C, H, W]
        theta: From `Augment.theta`, on the device of the images. [B, 2, 3]
        mode: "bilinear", or "nearest" for masks of labels.

    Returns:
        float [B, C, H, W]
    """
    with torch.autocast(images.device.type, enabled=False):
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode=mode, padding_mode="border", align_corners=False)


def move_boxes(boxes: Tensor, theta: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes of one image where `warp` puts them, cut to the image.

    Args:
        boxes: x0, y0, x1, y1 in pixels. float [N, 4]
        theta: Of the image. [2, 3]
        size: Height and width, pixels.

    Returns:
        float [N, 4]; a box that leaves the image has no area.
    """
    extent = torch.tensor([size[1], size[0]], dtype=boxes.dtype, device=boxes.device)
    scale, shift = theta[[0, 1], [0, 1]].to(boxes), theta[:, 2].to(boxes)
    corners = (boxes.reshape(-1, 2, 2) / extent * 2 - 1 - shift) / scale
    corners = ((corners + 1) / 2 * extent).clamp(min=torch.zeros_like(extent), max=extent)
    return torch.cat([corners.amin(1), corners.amax(1)], 1)
