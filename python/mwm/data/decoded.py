"""What a reader hands over, and the limits that hold before a file is decoded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mwm.data.errors import UnreadableImage


@dataclass(frozen=True)
class Decoded:
    """One slice as stored, before its intensities are mapped to [0, 1].

    Attributes:
        values: pixel values in stored units (after a DICOM's rescale). uint8, uint16 or float32 [C, H, W]
        window: (centre, width) that the file itself names, in the same units.
        bounds: 0.5 and 99.5 percentile of the whole volume, where the slice belongs to one.
        extremes: minimum and maximum of the whole volume, likewise.
    """

    values: np.ndarray
    window: tuple[float, float] | None = None
    bounds: tuple[float, float] | None = None
    extremes: tuple[float, float] | None = None


def check_size(height: int, width: int, limit: int, *, name: str, channels: int = 1) -> None:
    """Refuse a file that declares an absurd size, before memory is taken for it.

    Raises:
        UnreadableImage: more pixels than `limit`, or none.
    """
    if height < 1 or width < 1 or channels < 1:
        raise UnreadableImage(f"{name}: an image must have pixels, got {height}x{width}.")
    if height * width > limit or channels > 4096 or height * width * channels > 4 * limit:
        raise UnreadableImage(f"{name}: declares {height}x{width} pixels in {channels} channels, over the limit of {limit} pixels. If the "
                              "file is right, raise max_pixels.")
