"""The C library's heap, for commands that train."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, maps of any size, so that the next step finds its memory mapped. Whether it could be asked.

    glibc gives every block of more than 32 MiB back to the system, and each step then pays a page fault for every 4 KiB of it: in a step of
    ResNet-50 with decoder width 768, eight images of 224 pixels in float32, 13 % of the time (`bench/NOTES.md`); the peak of memory grows by
    a tenth. For the whole process, so only commands call this, not the library. Elsewhere than on glibc it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        getattr(libc, "gnu_get_libc_version")  # noqa: B009  # other C libraries give these numbers other meanings, if they know mallopt at all
        return bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1))
    return False
