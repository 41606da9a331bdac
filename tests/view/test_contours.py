"""Truth and prediction are both seen, also where they agree."""

from __future__ import annotations

import numpy as np
import pytest

from mwm.view.contours import PREDICTED_RGB, TRUTH_RGB, contours


def count(picture, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(picture) == colour).all(-1).sum())


def test_both_outlines_are_seen_where_the_masks_agree() -> None:
    image, mask = np.full((40, 60), 0.5), np.zeros((40, 60), bool)
    mask[10:30, 20:40] = True
    picture = contours(image, mask, mask, size=60)
    pixels = np.asarray(picture)
    assert picture.size == (60, 40)
    assert tuple(pixels[20, 19]) == tuple(pixels[20, 18]) == TRUTH_RGB
    assert tuple(pixels[20, 20]) == tuple(pixels[20, 21]) == PREDICTED_RGB
    assert tuple(pixels[20, 30]) == (128, 128, 128)
    assert count(picture, PREDICTED_RGB) == 20 * 20 - 16 * 16


def test_masks_at_the_border_and_empty_masks_are_drawn_without_error() -> None:
    image = np.zeros((3, 30, 30))
    assert count(contours(image, np.zeros((30, 30)), None, size=30), TRUTH_RGB) == 0
    assert count(contours(image, None, np.ones((30, 30)), size=30), PREDICTED_RGB) == 0  # its outline is that of the picture
    labels = np.zeros((30, 30), int)
    labels[:, :15], labels[:, 15:] = 1, 2
    assert count(contours(image, None, labels, size=30), PREDICTED_RGB) == 4 * 30


def test_masks_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="size of the image"):
        contours(np.zeros((3, 4)), np.zeros((4, 3)), None)
