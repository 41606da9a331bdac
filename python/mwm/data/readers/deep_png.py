"""PNG with 16-bit colour, or 16-bit grey and alpha: Pillow cuts them to 8 bits, so they are decoded here (PNG specification, sections 7, 9)."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import UnreadableImage
from ..limits import check_pixels

_BANDS = {2: 3, 4: 2, 6: 4}  # colour type: samples of a pixel


def read_deep_png(path: Path) -> NDArray[np.uint16] | None:
    """Decode such a file, alpha dropped; None for every other file. uint16 [1 or 3, H, W]

    Raises:
        UnreadableImage: truncated, damaged, interlaced, or beyond the limit.
    """
    with open(path, "rb") as file:
        head = file.read(33)
        if head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR" or len(head) < 33 or head[24] != 16 or head[25] not in _BANDS:
            return None
        width, height = struct.unpack(">II", head[16:24])
        bands = _BANDS[head[25]]
        check_pixels(height, width, bands)
        if head[28]:
            raise UnreadableImage("it is an interlaced PNG with 16-bit colour; save it without interlacing")
        packed = _image_data(file.read())
    wanted = height * (1 + 2 * bands * width)
    try:
        rows = zlib.decompressobj().decompress(packed, wanted + 1)
    except zlib.error as error:
        raise UnreadableImage("it is truncated or damaged") from error
    if len(rows) < wanted:
        raise UnreadableImage("it is truncated or damaged")
    lines = np.frombuffer(rows, np.uint8, wanted).reshape(height, -1)
    if lines[:, 0].max() > 4:
        raise UnreadableImage("it is truncated or damaged")
    data = _unfilter(lines[:, 0], lines[:, 1:].reshape(height, width, 2 * bands))
    values = data.reshape(height, width, bands, 2).astype(np.uint16)
    return np.ascontiguousarray(np.moveaxis(values[..., 0] << 8 | values[..., 1], 2, 0)[: 1 if bands == 2 else 3])


def _image_data(chunks: bytes) -> bytes:
    """The IDAT chunks behind each other."""
    parts, at = [], 0
    while at + 8 <= len(chunks):
        length, kind = struct.unpack_from(">I4s", chunks, at)
        if kind == b"IDAT":
            parts.append(chunks[at + 8 : at + 8 + length])
        at += 12 + length
    return b"".join(parts)


def _unfilter(kinds: NDArray[np.uint8], data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Undo the filters of all rows at once: along anti-diagonals, where every pixel's left, upper and upper-left neighbours are known.

    Args:
        kinds: Filter of each row. [H]
        data: Filtered bytes. [H, W, bytes of a pixel]
    """
    height, width, _ = data.shape
    full = np.zeros((height + 1, width + 1, data.shape[2]), np.int16)  # a border of zeros above and at the left
    for diagonal in range(height + width - 1):
        row = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        column = diagonal - row
        left, up, corner = full[row + 1, column], full[row, column + 1], full[row, column]
        guess = left + up - corner
        to_left, to_up, to_corner = abs(guess - left), abs(guess - up), abs(guess - corner)
        paeth = np.where((to_left <= to_up) & (to_left <= to_corner), left, np.where(to_up <= to_corner, up, corner))
        predicted = np.choose(kinds[row][:, None], (np.zeros_like(left), left, up, (left + up) // 2, paeth))
        full[row + 1, column + 1] = (data[row, column] + predicted) & 255
    return full[1:, 1:].astype(np.uint8)
