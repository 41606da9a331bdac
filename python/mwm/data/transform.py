"""Crops and flips that move an image and its region together, as a pure function of (seed, id, epoch, view)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mwm.data.errors import DataError
from mwm.ops import random_words

STREAM = 32
"""Philox stream of the crops and flips; masks use other streams."""


@dataclass(frozen=True)
class JointTransform:
    """A random resized crop and a horizontal flip.

    Attributes:
        size: (height, width) of the result, pixels.
        crop_scale: least and largest share of the area that a crop keeps; (1, 1) keeps the whole image.
        crop_ratio: least and largest change of the aspect ratio (width over height, relative to the image's own).
        flip: flip half of the views left to right.
    """

    size: tuple[int, int]
    crop_scale: tuple[float, float] = (0.67, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", (self.size, self.size) if isinstance(self.size, int) else tuple(self.size))
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise DataError(f"transform: crop_scale must be (low, high) with 0 < low <= high <= 1, got {self.crop_scale}.")
        narrow, wide = self.crop_ratio
        if not 0 < narrow <= wide:
            raise DataError(f"transform: crop_ratio must be (low, high) with 0 < low <= high, got {self.crop_ratio}.")

    def __call__(self, image: Tensor, region: Tensor, *, seed: int, id: int, epoch: int, view: int = 0) -> tuple[Tensor, Tensor]:
        """Crop and flip.

        Args:
            image: float32. [C, H, W]
            region: float32 in [0, 1]. [H, W]
            seed, id, epoch, view: what the crop and the flip are a function of, and of nothing else.

        Returns:
            [C, *size] and [*size].
        """
        if image.shape[1:] != region.shape:
            raise DataError(f"transform: region must be {list(image.shape[1:])} like its image, got {list(region.shape)}.")
        top, left, height, width, flipped = self.window(tuple(region.shape), seed=seed, id=id, epoch=epoch, view=view)
        both = torch.cat([image, region[None]])[:, top : top + height, left : left + width]
        if flipped:
            both = both.flip(-1)
        if (height, width) != self.size:
            both = F.interpolate(both[None], self.size, mode="bilinear", align_corners=False, antialias=True)[0].clamp(0, 1)
        both = both.contiguous()
        return both[:-1], both[-1]

    def window(self, shape: tuple[int, int], *, seed: int, id: int, epoch: int, view: int = 0) -> tuple[int, int, int, int, bool]:
        """The crop (top, left, height, width in pixels) and whether it is flipped."""
        words = random_words(seed, torch.tensor([id]), epoch, view, STREAM, 5)[0].tolist()
        share, shape_word, y, x, coin = (word / 2**32 for word in words)
        area = self.crop_scale[0] + (self.crop_scale[1] - self.crop_scale[0]) * share
        if self.crop_scale == (1, 1):
            height, width = shape
        else:
            low, high = (math.log(r) for r in self.crop_ratio)
            ratio = math.exp(low + (high - low) * shape_word)
            height = min(shape[0], max(1, round(shape[0] * math.sqrt(area / ratio))))
            width = min(shape[1], max(1, round(shape[1] * math.sqrt(area * ratio))))
        top, left = int(y * (shape[0] - height + 1)), int(x * (shape[1] - width + 1))
        return top, left, height, width, bool(self.flip and coin < 0.5)
