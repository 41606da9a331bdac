"""Where a stored image lies in the picture a network sees: the arithmetic of `mwm.data.geometry.fit` for boxes and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mwm.data import ReadSettings


@dataclass(frozen=True)
class Placing:
    """A scale and an offset per axis: model = source * scale + offset, in pixels with edges at whole numbers.

    Attributes:
        scale: (vertical, horizontal).
        offset: (vertical, horizontal), model pixels.
        stored: (height, width) of the stored image.
        size: (height, width) of the model's picture.
    """

    scale: tuple[float, float]
    offset: tuple[float, float]
    stored: tuple[int, int]
    size: tuple[int, int]

    def to_model(self, boxes: NDArray) -> NDArray:
        """Boxes x0, y0, x1, y1 of the stored image in the model's picture, not clipped. [N, 4] -> float64 [N, 4]"""
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        return boxes * self._four(self.scale) + self._four(self.offset)

    def to_source(self, boxes: NDArray) -> NDArray:
        """Boxes x0, y0, x1, y1 of the model's picture in the stored image, clipped to it. [N, 4] -> float64 [N, 4]"""
        boxes = (np.asarray(boxes, np.float64).reshape(-1, 4) - self._four(self.offset)) / self._four(self.scale)
        height, width = self.stored
        return np.clip(boxes, 0, (width, height, width, height))

    @staticmethod
    def _four(pair: tuple[float, float]) -> NDArray:
        return np.array([pair[1], pair[0], pair[1], pair[0]])


def placing(stored: tuple[int, int], settings: ReadSettings, spacing: tuple[float, float] | None = None) -> Placing:
    """How `read_image` with these settings places an image of this size.

    Args:
        stored: (height, width) of the stored image, pixels.
        settings: Of which `size` and `aspect` are used.
        spacing: Height and width of a pixel in one unit; None for square pixels.
    """
    if settings.size is None:
        return Placing((1.0, 1.0), (0.0, 0.0), stored, stored)
    height, width = settings.size
    if settings.aspect == "stretch":
        return Placing((height / stored[0], width / stored[1]), (0.0, 0.0), stored, (height, width))
    tall, wide = stored[0] * (spacing[0] if spacing else 1.0), stored[1] * (spacing[1] if spacing else 1.0)
    if settings.aspect == "pad":
        scale = min(height / tall, width / wide)
        inner = min(max(1, round(tall * scale)), height), min(max(1, round(wide * scale)), width)
        offset = float((height - inner[0]) // 2), float((width - inner[1]) // 2)
        return Placing((inner[0] / stored[0], inner[1] / stored[1]), offset, stored, (height, width))
    scale = max(height / tall, width / wide)
    rows = max(1, min(stored[0], round(stored[0] * height / (scale * tall))))
    columns = max(1, min(stored[1], round(stored[1] * width / (scale * wide))))
    factors = height / rows, width / columns
    offset = -((stored[0] - rows) // 2) * factors[0], -((stored[1] - columns) // 2) * factors[1]
    return Placing(factors, offset, stored, (height, width))
