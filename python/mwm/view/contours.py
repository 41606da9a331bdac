"""Outlines of masks on an image: the truth and what was predicted."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mwm.view.overlay import SIZE
from mwm.view.pixels import REGION_RGB, enlarge, enlarge_plane, to_array, to_rgb

TRUTH_RGB = (64, 224, 208)
PREDICTED_RGB = REGION_RGB


def contours(image: object, truth: object | None, predicted: object | None, *, size: int = SIZE) -> Image.Image:
    """The image with the outline of the truth (turquoise, drawn outside of the mask) and of the prediction (orange, inside of it).

    So both lines are seen where the masks agree. Classes of a label map are outlined one by one in the same two colours.

    Args:
        image: float in [0, 1] or uint8. [C, H, W] or [H, W]
        truth: bool, or labels with 0 = background; None draws none. [H, W]
        predicted: The same. [H, W]
        size: Pixels on the longer side of the picture.

    Raises:
        ValueError: a mask has another shape than the image.
    """
    rgb = to_rgb(image)
    pixels = np.asarray(enlarge(rgb, size)).copy()
    for mask, colour, outside in ((truth, TRUTH_RGB, True), (predicted, PREDICTED_RGB, False)):
        if mask is None:
            continue
        labels = to_array(mask)
        if labels.shape != rgb.shape[:2]:
            raise ValueError(f"contours: masks must have the size of the image, got {list(labels.shape)} for an image of {list(rgb.shape[:2])}.")
        for label in np.unique(labels[labels != 0]):
            plane = enlarge_plane((labels == label).astype(np.float32), (pixels.shape[1], pixels.shape[0])) >= 0.5
            pixels[_ring(plane, outside=outside)] = colour
    return Image.fromarray(pixels)


def legend() -> str:
    """One line that says which colour is which."""
    return "turquoise: truth, orange: prediction"


def _ring(inside: np.ndarray, *, outside: bool, width: int = 2) -> np.ndarray:
    """The band of some pixels just outside, or just inside, of a mask. bool [H, W] -> bool [H, W]"""
    side = inside if outside else ~inside
    grown = side
    for _ in range(width):
        padded = np.pad(grown, 1)
        grown = grown | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return grown & ~side
