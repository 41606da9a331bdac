"""Decoded images in memory: one copy that forked loader workers share, checked by a checksum instead of locks."""

from __future__ import annotations

import mmap
import os
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DataError

Decoded = tuple[NDArray, tuple[int, int], tuple[float, float] | None]
"""Image uint16 [C, H, W], the size of the stored image, its pixel spacing."""


class RamCache:
    """Images by index.

    Images of one shape go into one anonymous mapping, whose pages are taken when they are first written and which forked
    workers share; a spawned worker, and images of other shapes, use a dict of the process. An entry is valid when its checksum fits,
    so that a half-written one is seen as missing on every machine.

    Args:
        count: Number of images.

    Raises:
        DataError: from `put`: the images do not fit into memory.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._own: dict[int, Decoded] = {}
        self._shape: tuple[int, ...] | None = None
        self._values: NDArray[np.uint16] | None = None
        self._facts: NDArray[np.float64] | None = None
        self._checks: NDArray[np.uint32] | None = None

    def prepare(self, shape: tuple[int, int, int]) -> None:
        """Take the mapping, before workers are forked.

        Args:
            shape: (C, H, W) of the images.
        """
        size = 2 * int(np.prod(shape, dtype=np.int64))
        total = self.count * size
        free = available_bytes()
        if free is not None and total > free:
            raise DataError(f"cache: ram must hold {self.count} images of {size // 1024} KiB, {total / 2**30:.1f} GiB, got {free / 2**30:.1f} GiB free. "
                            "Use disk, or smaller images.")
        self._shape = shape
        self._values = np.frombuffer(mmap.mmap(-1, max(1, total)), np.uint16, total // 2).reshape(self.count, *shape)
        self._facts = np.frombuffer(mmap.mmap(-1, 32 * max(1, self.count)), np.float64).reshape(-1, 4)
        self._checks = np.frombuffer(mmap.mmap(-1, 4 * max(1, self.count)), np.uint32)

    def get(self, index: int) -> Decoded | None:
        """An image, or None where it is not (wholly) there."""
        if self._values is None or self._checks is None or self._facts is None or not self._checks[index]:
            return self._own.get(index)
        values, facts = self._values[index].copy(), self._facts[index].copy()
        if _check(values, facts) != self._checks[index]:
            return None
        return values, (int(facts[0]), int(facts[1])), (float(facts[2]), float(facts[3])) if facts[2] > 0 else None

    def put(self, index: int, decoded: Decoded) -> None:
        """Keep an image."""
        values, stored, spacing = decoded
        if self._values is None or self._checks is None or self._facts is None or values.shape != self._shape:
            self._own[index] = decoded
            return
        facts = np.array([*stored, *(spacing or (0, 0))], np.float64)
        self._values[index], self._facts[index] = values, facts
        self._checks[index] = _check(values, facts)

    def __reduce__(self) -> tuple[Any, ...]:
        return RamCache, (self.count,)  # a spawned worker cannot map these pages


def available_bytes() -> int | None:
    """Memory that can be taken without swapping, bytes; None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _check(values: NDArray, facts: NDArray) -> int:
    """Checksum that is never 0, the mark of an empty entry."""
    return zlib.crc32(np.ascontiguousarray(values), zlib.crc32(facts)) or 1
