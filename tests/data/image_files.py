"""Pictures and broken files that the tests of this room share."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np


def ramp(height: int = 6, width: int = 8, top: int = 255) -> np.ndarray:
    """Different values everywhere, so that a flip or a shift shows."""
    return (np.arange(height * width).reshape(height, width) * top // (height * width - 1)).astype(np.int64)


def bomb_png(path: Path, width: int, height: int) -> Path:
    """A tiny PNG that claims width x height pixels of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * min(width * height // 8, 1 << 20), 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path
