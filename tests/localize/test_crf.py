"""The field: equal to all pairs of pixels written out, whatever the grid does inside."""

from __future__ import annotations

import numpy as np
import pytest

from mwm.localize.crf import CrfSettings, bilateral_kernel, dense_crf, one_axis

HEIGHT, WIDTH = 28, 22


def scene() -> tuple[np.ndarray, np.ndarray]:
    """A noisy map of a disc, and an image with a box there. [H, W], [1, H, W]"""
    generator = np.random.default_rng(0)
    image = np.zeros((1, HEIGHT, WIDTH))
    image[0, 8:20, 5:15] = 0.6
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    heat = 0.35 + 0.3 * (np.hypot(rows - 12, columns - 9) < 6) + 0.1 * generator.standard_normal((HEIGHT, WIDTH))
    return np.clip(heat, 0, 1), image + 0.04 * generator.random((1, HEIGHT, WIDTH))


def pairs(grey: np.ndarray, sigma: float, range_sigma: float = np.inf) -> np.ndarray:
    """Kernel between all pixels, symmetrically normalised. [H W, H W]"""
    rows, columns = (x.ravel() for x in np.mgrid[:HEIGHT, :WIDTH])
    kernel = np.exp(-((rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2) / 2 / sigma**2 - (grey.ravel()[:, None] - grey.ravel()) ** 2 / 2 / range_sigma**2)
    return kernel / np.sqrt(kernel.sum(0)[:, None] * kernel.sum(0))


def brute_force(heat: np.ndarray, image: np.ndarray, settings: CrfSettings) -> np.ndarray:
    """Two labels, softmax over energies, every pair of pixels."""
    edge = np.sqrt(heat.size)
    near, wide = pairs(image[0], settings.near * edge), pairs((image[0] - image.min()) / np.ptp(image), settings.wide * edge, settings.grey)
    p = np.clip(heat.ravel(), 1e-4, 1 - 1e-4)
    unary, q = -np.log(np.stack([1 - p, p])), np.stack([1 - p, p])
    for _ in range(settings.steps):
        energy = -unary + settings.near_weight * q @ near + settings.wide_weight * q @ wide
        q = np.exp(energy - energy.max(0))
        q /= q.sum(0)
    return q[1].reshape(heat.shape)


@pytest.mark.parametrize("settings", [CrfSettings(steps=5, wide=60 / 224, grey=0.05), CrfSettings(steps=1, wide=60 / 224, grey=0.05),
                                      CrfSettings(near=0.1, near_weight=0.5, wide=0.5, grey=0.2, wide_weight=1.0, steps=3)])
def test_field_is_that_of_all_pairs_of_pixels(settings: CrfSettings) -> None:
    heat, image = scene()
    ours, theirs = dense_crf(heat, image, settings), brute_force(heat, image, settings)
    assert np.abs(ours - theirs).max() < 0.02
    assert np.abs(theirs - heat).max() > 0.2  # the field does something


@pytest.mark.parametrize(("sigma", "range_sigma"), [(5.0, 0.05), (8.0, 0.2), (13.0, 0.1)])
def test_grid_is_within_three_per_cent_of_the_bilateral_kernel(sigma: float, range_sigma: float) -> None:
    grey = one_axis(scene()[1])
    x = np.random.default_rng(1).standard_normal(grey.shape)
    exact = (pairs(grey, sigma, range_sigma) @ x.ravel()).reshape(grey.shape)
    assert np.abs(bilateral_kernel(grey, sigma, range_sigma)(x) - exact).max() < 0.03 * np.abs(exact).max()


def test_colours_are_told_apart_that_have_the_same_mean() -> None:
    image = np.full((3, 20, 20), 0.4)
    image[0, :, 10:], image[2, :, 10:] = 0.7, 0.1
    axis = one_axis(image)
    assert abs(axis[0, 0] - axis[0, 19]) == pytest.approx(1)
    assert np.array_equal(one_axis(np.full((3, 4, 4), 0.3)), np.zeros((4, 4)))


def test_image_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"image must be \[C, H, W\] of the map's size"):
        dense_crf(np.zeros((4, 4)), np.zeros((1, 5, 4)))


def test_a_large_image_has_the_field_of_a_small_one_and_not_its_memory_times_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen million pixels had taken 3.4 GB and two minutes."""
    import mwm.localize.crf as crf

    rows, columns = np.mgrid[:96, :120]
    disc = ((rows - 45) ** 2 + (columns - 60) ** 2 < 900).astype(np.float32)
    image = (0.2 + 0.6 * disc + 0.02 * np.random.default_rng(0).standard_normal(disc.shape)).clip(0, 1).astype(np.float32)
    heat = np.clip(0.2 + 0.6 * np.roll(disc, 4, 1), 0, 1).astype(np.float32)
    expected = crf.dense_crf(heat, image[None])
    large = crf.dense_crf(np.kron(heat, np.ones((4, 4), np.float32)), np.kron(image, np.ones((4, 4), np.float32))[None])
    seen: list[int] = []
    kernel = crf.bilateral_kernel
    monkeypatch.setattr(crf, "bilateral_kernel", lambda grey, *rest: seen.append(grey.size) or kernel(grey, *rest))
    monkeypatch.setattr(crf, "_MOST", heat.size)
    bounded = crf.dense_crf(np.kron(heat, np.ones((4, 4), np.float32)), np.kron(image, np.ones((4, 4), np.float32))[None])
    assert bounded.shape == (384, 480) and bounded.dtype == np.float32 and max(seen) <= heat.size
    assert np.abs(bounded.reshape(96, 4, 120, 4).mean((1, 3)) - expected).mean() < 0.01
    assert ((bounded >= 0.5) == (large >= 0.5)).mean() > 0.99
