"""Crops and flips that move image and region together, as a pure function of (seed, id, epoch, view)."""

from __future__ import annotations

import math

from torch import Tensor

from mwm.ops import random_words

from .errors import DataError
from .geometry import resize

STREAM = 32
"""Stream of the random words for crops and flips."""


class JointTransform:
    """A random resized crop and a horizontal flip.

    area = scale · H · W with scale uniform in `crop_scale`, aspect ratio log-uniform in `crop_ratio` (times that of the image),
    cut to the image, placed uniformly; then bilinear to `size` with antialiasing; then flipped with probability 1/2.
    With `crop_scale` (1, 1) the whole image is taken. The left side is the patient's other side after a flip: regions move
    along, words such as "left" do not, so localize before.

    Args:
        size: (height, width) of the result, pixels, or one edge.
        crop_scale: Least and largest area, shares of the image.
        crop_ratio: Least and largest change of the aspect ratio.
        flip: Whether to flip half of the views left to right.

    Raises:
        DataError: a range is not 0 < low <= high (<= 1 for the scale).
    """

    def __init__(self, size: int | tuple[int, int], crop_scale: tuple[float, float] = (0.67, 1.0), crop_ratio: tuple[float, float] = (3 / 4, 4 / 3), flip: bool = True) -> None:
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.crop_scale, self.crop_ratio, self.flip = tuple(crop_scale), tuple(crop_ratio), bool(flip)
        if min(self.size) < 1:
            raise DataError(f"transform: size must be positive, got {self.size}.")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise DataError(f"transform: crop_scale must be two shares 0 < low <= high <= 1, got {self.crop_scale}.")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise DataError(f"transform: crop_ratio must be two numbers 0 < low <= high, got {self.crop_ratio}.")

    def box(self, height: int, width: int, *, seed: int, id: int, epoch: int, view: int = 0) -> tuple[int, int, int, int, bool]:
        """(top, left, height, width) of the crop in pixels of the image, and whether it is flipped."""
        words = random_words(seed, [id], epoch, view, STREAM, 5)[0].tolist()
        scale, ratio, top, left = (word / 2**32 for word in words[:4])
        flipped = self.flip and words[4] < 2**31
        if self.crop_scale == (1.0, 1.0):
            return 0, 0, height, width, flipped
        area = self.crop_scale[0] + scale * (self.crop_scale[1] - self.crop_scale[0])
        low, high = (math.log(bound) for bound in self.crop_ratio)
        stretch = math.exp(0.5 * (low + ratio * (high - low)))
        h = min(height, max(1, round(height * math.sqrt(area) / stretch)))
        w = min(width, max(1, round(width * math.sqrt(area) * stretch)))
        return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w, flipped

    def __call__(self, image: Tensor, region: Tensor | None, *, seed: int, id: int, epoch: int, view: int = 0) -> tuple[Tensor, Tensor | None]:
        """Draw one view.

        Args:
            image: float [C, H, W].
            region: float [H, W], or several maps [n, H, W], or None.
            seed: In [0, 2⁶⁴).
            id: Of the image, in [0, 2³²).
            epoch: From 0.
            view: Number of the view of the image within the epoch.

        Returns:
            Image [C, *size] and region [*size] or [n, *size], contiguous.

        Raises:
            DataError: image and region differ in size.
        """
        height, width = image.shape[-2:]
        if region is not None and (tuple(region.shape[-2:]) != (height, width) or region.ndim > 3):
            raise DataError(f"transform: region must be [{height}, {width}] as its image, got {list(region.shape)}.")
        top, left, h, w, flipped = self.box(height, width, seed=seed, id=id, epoch=epoch, view=view)

        def move(x: Tensor) -> Tensor:
            x = resize(x[:, top : top + h, left : left + w], self.size)
            return (x.flip(-1) if flipped else x).contiguous()

        if region is None:
            return move(image), None
        moved = move(region.reshape(-1, height, width)).clamp_(0, 1)  # rounding may leave 1 by one ulp
        return move(image), moved.view(*region.shape[:-2], *self.size)
