"""Limits that a hostile or broken file meets before anything is decoded. Change them here, in code, where data need more."""

from __future__ import annotations

from .errors import UnreadableImage

MAX_PIXELS = 8192 * 8192
"""Pixels of one image or slice, all channels."""

MAX_VOXELS = 2**28
"""Voxels of one volume (512 x 512 x 1024)."""

MAX_FILE_BYTES = 4 * 2**30
"""Size of one image file, bytes."""

MAX_FILES = 2_000_000
"""Images of one list, slices counted."""

MAX_LIST_BYTES = 512 * 2**20
"""Size of a text list or index CSV, bytes."""

MAX_DEPTH = 64
"""Nesting of folders."""


def check_pixels(*shape: int) -> None:
    """Refuse an image that claims more pixels than `MAX_PIXELS`, or none.

    Raises:
        UnreadableImage: the claim is out of bounds.
    """
    count = _product(shape)
    if count < 1:
        raise UnreadableImage(f"it claims {_times(shape)} pixels, which is no image")
    if count > MAX_PIXELS:
        raise UnreadableImage(f"it claims {_times(shape)} pixels, more than the limit of {MAX_PIXELS:,}; crop or shrink it first")


def check_voxels(*shape: int) -> None:
    """Refuse a volume that claims more voxels than `MAX_VOXELS`, or none.

    Raises:
        UnreadableImage: the claim is out of bounds.
    """
    count = _product(shape)
    if count < 1:
        raise UnreadableImage(f"it claims {_times(shape)} voxels, which is no volume")
    if count > MAX_VOXELS:
        raise UnreadableImage(f"it claims {_times(shape)} voxels, more than the limit of {MAX_VOXELS:,}; split it first")


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for edge in shape:
        if edge < 0:
            return 0
        count *= int(edge)
    return count


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(str(edge) for edge in shape)
