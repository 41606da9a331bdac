"""Copies are found whatever their format or size; other pictures of the same kind are not."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mwm.data.likeness import alike, hamming, near_duplicates, perceptual_hash, thumbnail


def scans(count: int) -> np.ndarray:
    """Blurred noise inside one common outline, as scans of one body part are. uint8 [N, 96, 96]"""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:96j, -1:1:96j]
    outline = np.clip(3 - 4 * (x**2 + y**2), 0, 1)
    rough = torch.from_numpy(rng.random((count, 1, 12, 12)))
    inside = torch.nn.functional.interpolate(rough, (96, 96), mode="bicubic")[:, 0].numpy()
    return np.clip(255 * outline * (0.35 + 0.6 * inside), 0, 255).astype(np.uint8)


def small(pixels: np.ndarray) -> np.ndarray:
    return thumbnail(torch.from_numpy(pixels.astype(np.float32) / 255)[None])


def changed(pixels: np.ndarray, how: str) -> np.ndarray:
    picture = Image.fromarray(pixels)
    if how == "jpeg":
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=60)
        picture = Image.open(stream)
    elif how == "smaller":
        picture = picture.resize((61, 61), Image.Resampling.LANCZOS)
    elif how == "brighter":
        picture = picture.point(lambda v: min(255, int(20 + 0.8 * v)))
    elif how == "marked":
        picture.paste(255, (3, 3, 9, 9))
    return np.asarray(picture)


@pytest.mark.parametrize("how", ["same", "jpeg", "smaller", "brighter"])
def test_a_changed_copy_is_found_and_no_other_picture(how: str) -> None:
    originals = scans(40)
    a = np.stack([small(p) for p in originals])
    b = np.stack([small(changed(p, how)) for p in originals[10:20]])
    assert alike(a, b).tolist() == [[10 + k, k] for k in range(10)]


def test_the_hash_is_the_sign_of_low_frequencies_about_their_median() -> None:
    rng = np.random.default_rng(1)
    pixels = rng.random((3, 32, 32))
    n = np.arange(32)
    basis = np.cos(np.pi * (n[None] + 0.5) * n[:, None] / 32) * np.where(n[:, None] == 0, np.sqrt(1 / 32), np.sqrt(2 / 32))
    for image, value in zip(pixels, perceptual_hash(pixels), strict=True):
        low = (basis @ image @ basis.T)[:8, :8].ravel()
        bits = (low > np.median(low[1:])).astype(int)
        bits[0] = 0
        assert int("".join(map(str, bits)), 2) == int(value)


def test_distance_counts_bits_and_pairs_are_all_within_it() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 2**63, 70, dtype=np.uint64), rng.integers(0, 2**63, 50, dtype=np.uint64)
    brute = np.array([[bin(int(x) ^ int(y)).count("1") for y in b] for x in a])
    assert np.array_equal(hamming(a[:, None], b[None]), brute)
    assert near_duplicates(a, b, 24).tolist() == np.argwhere(brute <= 24).tolist()
    assert near_duplicates(a[:0], b).shape == (0, 2)
    with pytest.raises(ValueError, match="near_duplicates: distance must be in 0 … 32 bits, got 65"):
        near_duplicates(a, b, 65)


def test_pictures_without_structure_are_like_nothing() -> None:
    flat = np.full((4, 32, 32), 0.3)
    assert len(alike(flat, flat)) == 0


def test_colour_and_grey_of_one_picture_are_alike() -> None:
    grey = torch.from_numpy(scans(1)[0].astype(np.float32) / 255)[None]
    assert len(alike(thumbnail(grey)[None], thumbnail(grey.expand(3, -1, -1))[None])) == 1
