"""Soft regions as what they are made of: the localizer's own coarse map and the outline, instead of all pixels. Ten times smaller, and equal to one step of 1/255.

A map of a localizer is a grid of a few hundred values, brought to the image's size bilinearly; a soft region is that map inside an outline. Kept are the grid in 16 bits, found
again from the map by least squares, and the outline in one bit per pixel. Reading interpolates in whole numbers (float64 products and sums that stay below 2⁵³ are exact in any
order), so that every machine finds the same 8-bit values.

Layout of an entry (uint8, deflated by `blob`): version u8 · height, width u32 · rows, columns u16 · grid u16 [rows, columns] · outline, bits row by row. Little-endian.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .blob import CorruptEntry
from .limits import MAX_PIXELS

_HEAD = struct.Struct("<BIIHH")
_VERSION = 1
_ONE = 1 << 14  # of interpolation weights
_UNIT, _ZERO = 1 << 15, 1 << 14  # of grid values, which lie in [-1/2, 3/2): where a map peaks between pixels the grid is beyond what the pixels show
_AT_ONCE = 1 << 16  # pixels, so that float64 stays in a cache
_WORTH = 16  # so many times fewer values than pixels, or all pixels are kept
_WIDEST = 64  # beyond, a matrix product costs more than inflating all pixels
_LONGEST = 65535  # pixels of an edge, whose weights are [edge, grid] float64
_SLACK = 1  # of 255


def encode(values: NDArray, surface: NDArray, grid: tuple[int, int]) -> NDArray | None:
    """A soft region as grid and outline, or None where it is not what a grid and an outline give, or not worth it.

    Args:
        values: The region in 8 bits. uint8 [H, W]
        surface: The map that its values are taken from. float32 [H, W] in [0, 1]
        grid: Rows and columns of the localizer's own map.

    Returns:
        uint8 [N]
    """
    (height, width), (rows, columns) = values.shape, grid
    if surface.shape != values.shape or not _worth(height, width, rows, columns):
        return None
    coarse = _back(height, rows) @ surface.astype(np.float64) @ _back(width, columns).T
    stored = np.round(coarse * _UNIT + _ZERO).clip(0, 65535).astype("<u2")
    outline = values > 0
    if int(np.abs(_interpolated(stored, outline).astype(np.int16) - values).max()) > _SLACK:
        return None
    head = _HEAD.pack(_VERSION, height, width, rows, columns)
    return np.frombuffer(head + stored.tobytes() + np.packbits(outline).tobytes(), np.uint8)


def decode(entry: NDArray) -> NDArray:
    """What `encode` wrote, as all pixels. uint8 [N] → uint8 [H, W]

    Raises:
        CorruptEntry: it is something else.
    """
    data = entry.tobytes()
    if len(data) < _HEAD.size:
        raise CorruptEntry
    version, height, width, rows, columns = _HEAD.unpack_from(data)
    if version != _VERSION or not _worth(height, width, rows, columns):
        raise CorruptEntry
    middle = _HEAD.size + 2 * rows * columns
    if len(data) != middle + -(-height * width // 8):
        raise CorruptEntry
    grid = np.frombuffer(data[_HEAD.size : middle], "<u2").reshape(rows, columns)
    outline = np.unpackbits(np.frombuffer(data[middle:], np.uint8), count=height * width).reshape(height, width)
    return _interpolated(grid, outline)


def _worth(height: int, width: int, rows: int, columns: int) -> bool:
    """Whether such a grid is ever written; another one in a file would ask for more memory or time than its region is worth."""
    fits = 0 < rows <= min(height, _WIDEST) and 0 < columns <= min(width, _WIDEST) and max(height, width) <= _LONGEST
    return fits and height * width <= MAX_PIXELS and rows * columns * _WORTH <= height * width


def _interpolated(grid: NDArray, outline: NDArray) -> NDArray:
    """Grid uint16 [h, w] and outline [H, W] → uint8 [H, W], at least 1 inside and 0 outside, in whole numbers"""
    height, width = outline.shape
    wide = grid.astype(np.float64) @ _forth(width, grid.shape[1]).T
    down = _forth(height, grid.shape[0])
    values = np.empty((height, width), np.uint8)
    rows = max(1, _AT_ONCE // width)
    for top in range(0, height, rows):
        full = down[top : top + rows] @ wide  # in units of 1 / (_UNIT · _ONE²), a power of two: what follows is exact as well
        full *= 255 / (_UNIT * _ONE * _ONE)
        full += 0.5 - 255 * _ZERO / _UNIT
        np.clip(np.floor(full, out=full), 1, 255, out=full)
        values[top : top + rows] = full
    values *= outline.astype(bool)
    return values


@lru_cache(maxsize=16)
def _forth(size: int, count: int) -> NDArray:
    """Bilinear weights from grid values to pixels in units of 1 / _ONE; pixel centres, no corners aligned. Whole numbers, float64 [size, count]"""
    places = (2 * np.arange(size, dtype=np.int64) + 1) * count  # 2 · size · (position + 1/2)
    scaled = np.maximum((places * _ONE + size) // (2 * size) - _ONE // 2, 0)  # position in units of 1 / _ONE, rounded
    first = np.minimum(scaled // _ONE, count - 1)
    weight = scaled - first * _ONE
    matrix, pixels = np.zeros((size, count)), np.arange(size)
    np.add.at(matrix, (pixels, first), _ONE - weight)
    np.add.at(matrix, (pixels, np.minimum(first + 1, count - 1)), weight)
    return matrix


@lru_cache(maxsize=16)
def _back(size: int, count: int) -> NDArray:
    """From an edge of pixels to the grid values that it was interpolated from, by least squares. float64 [count, size]"""
    return np.linalg.pinv(_forth(size, count) / _ONE)
