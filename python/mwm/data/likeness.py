"""Near-identical images: a perceptual hash, a small thumbnail, and which pairs of images agree in both."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .geometry import convert_channels, resize

EDGE = 32
"""Edge of the grey thumbnail that hash and likeness are computed from, pixels."""

DISTANCE, LIKENESS = 8, 0.99
"""Bits of 64 that near-identical images differ in at most, and the least correlation of their thumbnails. The hash alone calls scans of two patients alike: of
2000 X-rays and MR slices, hundreds of pairs lie within 8 bits, while no two patients correlate above 0.99."""

_BLOCK = 1 << 22  # comparisons held in memory at once


def thumbnail(image: Tensor) -> NDArray:
    """The image in grey at 32 x 32 pixels, whatever its size, format or compression was.

    Args:
        image: float [C, H, W] in [0, 1]

    Returns:
        float32 [32, 32]
    """
    grey = convert_channels(image, 1) if image.shape[0] in (1, 3) else image.mean(0, keepdim=True)
    return resize(grey.float(), (EDGE, EDGE))[0].numpy()


def perceptual_hash(thumbnails: NDArray) -> NDArray:
    """pHash: the signs of the 64 lowest frequencies of the cosine transform about their median.

    Equal or nearly so for images that differ in size, compression, brightness or contrast; source: Zauner, "Implementation and benchmarking of
    perceptual image hash functions" (2010).

    Args:
        thumbnails: From `thumbnail`. float [N, 32, 32]

    Returns:
        uint64 [N]
    """
    from scipy.fft import dctn

    low = dctn(np.asarray(thumbnails, np.float64), axes=(1, 2), norm="ortho")[:, :8, :8].reshape(-1, 64)
    # Without the mean brightness, which is no structure and lies far from all other values.
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    bits[:, 0] = False
    return np.packbits(bits, axis=1).view(">u8").reshape(-1).astype(np.uint64)


def hamming(a: NDArray, b: NDArray) -> NDArray:
    """Bits in which hashes differ; shapes broadcast. uint64 -> int64"""
    x = np.bitwise_xor(a, b)
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((x * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.int64)


def near_duplicates(hashes_a: NDArray, hashes_b: NDArray, distance: int = DISTANCE) -> NDArray:
    """Pairs of hashes that differ in at most `distance` bits: candidates, which `alike` confirms.

    Args:
        hashes_a: uint64 [N]
        hashes_b: uint64 [M]
        distance: Bits, of 64.

    Returns:
        Rows (i, j), in order. int64 [P, 2]

    Raises:
        ValueError: the distance is not in 0 … 32.
    """
    if not 0 <= distance <= 32:
        raise ValueError(f"near_duplicates: distance must be in 0 … 32 bits, got {distance}.")
    found = [np.argwhere(hamming(block[:, None], hashes_b[None]) <= distance) + np.array([start, 0]) for start, block in _blocks(hashes_a, len(hashes_b))]
    return np.concatenate(found) if found else np.empty((0, 2), np.int64)


def alike(thumbnails_a: NDArray, thumbnails_b: NDArray, *, distance: int = DISTANCE, likeness: float = LIKENESS) -> NDArray:
    """Pairs of near-identical images: their hashes agree, and so do their thumbnails.

    Args:
        thumbnails_a: [N, 32, 32]
        thumbnails_b: [M, 32, 32]
        distance: Bits of 64 in which the hashes may differ.
        likeness: Least correlation over the pixels of the thumbnails.

    Returns:
        Rows (i, j), in order. int64 [P, 2]
    """
    if not len(thumbnails_a) or not len(thumbnails_b):
        return np.empty((0, 2), np.int64)
    pairs = near_duplicates(perceptual_hash(thumbnails_a), perceptual_hash(thumbnails_b), distance)
    a, b = _standard(thumbnails_a), _standard(thumbnails_b)
    return pairs[(a[pairs[:, 0]] * b[pairs[:, 1]]).sum(1) >= likeness]


def _standard(thumbnails: NDArray) -> NDArray:
    """Centred and of length 1, so that a dot product is a correlation; a constant image correlates with nothing. [N, 1024]"""
    x = np.asarray(thumbnails, np.float64).reshape(len(thumbnails), -1)
    x = x - x.mean(1, keepdims=True)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)


def _blocks(hashes: NDArray, width: int) -> Iterator[tuple[int, NDArray]]:
    rows = max(1, _BLOCK // max(1, width))
    for start in range(0, len(hashes), rows):
        yield start, hashes[start : start + rows]
