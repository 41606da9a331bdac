"""From stored values to [0, 1]."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .errors import UnreadableImage
from .raw import Raw, extent_of, percentiles_of
from .settings import ReadSettings

CT_WINDOW = (40.0, 400.0)
"""Centre and width in HU where neither the user nor the header names a window: soft tissue."""


def map_intensity(raw: Raw, settings: ReadSettings) -> NDArray[np.float32]:
    """Map stored values to [0, 1] as `ReadSettings.intensity` says.

    Values that are not finite count for no statistic and become the lowest value. An image of one value becomes zeros.

    Args:
        raw: What a reader returned.
        settings: Of which `intensity` is used.

    Returns:
        float32 [C, H, W] in [0, 1].

    Raises:
        UnreadableImage: no value is finite.
    """
    values = raw.values
    finite = None
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        if finite.all():
            finite = None
        elif not finite.any():
            raise UnreadableImage("it holds no finite value")
    low, high = _range(raw, settings)
    if not high > low:
        mapped = np.zeros(values.shape, np.float32)
        return mapped + np.float32(raw.inverted)
    if values.dtype == np.uint8 and (low, high) == (0.0, 255.0):
        mapped = values.astype(np.float32) / np.float32(255)
    else:
        mapped = np.clip((np.where(finite, values, low) if finite is not None else values).astype(np.float64), low, high)
        mapped = ((mapped - low) / (high - low)).astype(np.float32)
    return 1 - mapped if raw.inverted else mapped


def _range(raw: Raw, settings: ReadSettings) -> tuple[float, float]:
    """Values that become 0 and 1."""
    window = settings.window
    if settings.intensity == "auto":
        if raw.values.dtype == np.uint8 and raw.window is None:
            return 0.0, 255.0
        window = raw.window or (CT_WINDOW if raw.is_ct else None)
    if window is not None:
        return window[0] - window[1] / 2, window[0] + window[1] / 2
    extent = raw.extent or extent_of(raw.values)
    if settings.intensity == "minmax":
        return extent
    low, high = raw.percentiles or percentiles_of(raw.values)
    return (low, high) if high > low else extent
