"""What a reader hands on: values as stored, and the few facts that the mapping to [0, 1] needs. No header text leaves a reader."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Raw:
    """One decoded image or slice before its values become [0, 1].

    Attributes:
        values: As stored, after rescale slope and intercept. any real dtype [C, H, W]
        is_ct: Whether the values are Hounsfield units.
        window: (centre, width) that the header proposes, or None.
        inverted: Whether low values are bright.
        spacing: Height and width of a pixel in one unit, or None where not known.
        percentiles: 0.5 % and 99.5 % of the values of the whole volume, or None for an image of its own.
        extent: Lowest and highest value of the whole volume, or None.
    """

    values: NDArray
    is_ct: bool = False
    window: tuple[float, float] | None = None
    inverted: bool = False
    spacing: tuple[float, float] | None = None
    percentiles: tuple[float, float] | None = None
    extent: tuple[float, float] | None = None


def percentiles_of(values: NDArray, most: int = 1 << 22) -> tuple[float, float]:
    """0.5 % and 99.5 % of the finite values; of every k-th where there are more than `most`.

    Args:
        values: Real numbers of any shape, at least one of them finite.
        most: How many values are sorted at most.
    """
    flat = values.reshape(-1)
    flat = flat[:: -(-flat.size // most)]
    if flat.dtype.kind == "f":
        flat = flat[np.isfinite(flat)]
    if not flat.size:
        return extent_of(values)
    low, high = np.percentile(flat, (0.5, 99.5))
    return float(low), float(high)


def extent_of(values: NDArray) -> tuple[float, float]:
    """Lowest and highest finite value; (0, 0) where there is none."""
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        if not finite.all():
            values = values[finite]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
