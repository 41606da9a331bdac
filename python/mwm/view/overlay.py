"""Pictures of one image: its heat map, its region, its mask."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mwm.view.pixels import HIDDEN_RGB, REGION_RGB, enlarge, enlarge_plane, heat_colours, to_array, to_plane, to_rgb

SIZE = 288  # pixels on the longer side of every picture, unless asked otherwise


def picture(image: object, *, size: int = SIZE) -> Image.Image:
    """The image itself. [C, H, W] or [H, W], float in [0, 1] or uint8"""
    return enlarge(to_rgb(image), size)


def heat_map(region: object, *, image: object | None = None, size: int = SIZE) -> Image.Image:
    """A map in colours; over the image, where one is given.

    Args:
        region: float in [0, 1]. [H, W]
        image: shown in grey beneath the colours, which fade out where the map is low. [C, H, W]
    """
    plane = to_plane(region)
    colours = heat_colours(plane)
    if image is None:
        return enlarge(colours, size)
    base = np.asarray(enlarge(to_rgb(image), size), dtype=float)
    smooth = enlarge_plane(plane, (base.shape[1], base.shape[0]))[..., None]
    strength = 0.55 * np.clip(smooth, 0, 1) ** 0.6
    return Image.fromarray(np.rint(base * (1 - strength) + heat_colours(smooth[..., 0]) * strength).astype(np.uint8))


def overlay(image: object, region: object, *, size: int = SIZE, strength: float = 0.22) -> Image.Image:
    """The image with its region tinted and outlined.

    Args:
        image: [C, H, W]
        region: float in [0, 1], on any grid of the same aspect; soft maps tint softly, the outline follows 0.5. [H, W]
        strength: share of the tint at region = 1.
    """
    base = np.asarray(enlarge(to_rgb(image), size), dtype=float)
    plane = enlarge_plane(to_plane(region), (base.shape[1], base.shape[0]))
    weight = (strength * plane)[..., None]
    return _outlined(base * (1 - weight) + np.array(REGION_RGB) * weight, plane)


def mask_picture(image: object, active: object, *, region: object | None = None, size: int = SIZE) -> Image.Image:
    """What the encoder sees: hidden patches are covered, the region is outlined.

    Args:
        image: [C, H, W]
        active: bool, True = visible. [Gh, Gw]
        region: outlined where given. [H, W]

    Raises:
        ValueError: `active` is not a grid.
    """
    visible = to_array(active).astype(bool)
    if visible.ndim != 2:
        raise ValueError(f"view: active must be [Gh, Gw], got {list(visible.shape)}. Pass the mask of one image.")
    base = np.array(enlarge(to_rgb(image), size), dtype=float)
    height, width = base.shape[:2]
    rows = np.rint(np.linspace(0, height, visible.shape[0] + 1)).astype(int)
    columns = np.rint(np.linspace(0, width, visible.shape[1] + 1)).astype(int)
    for r, c in zip(*np.nonzero(~visible), strict=True):
        base[rows[r] : rows[r + 1], columns[c] : columns[c + 1]] = HIDDEN_RGB
    seam = np.array(HIDDEN_RGB) * 0.86
    for r, c in zip(*np.nonzero(~visible), strict=True):
        base[rows[r], columns[c] : columns[c + 1]] = seam
        base[rows[r] : rows[r + 1], columns[c]] = seam
    if region is None:
        return Image.fromarray(np.rint(base).astype(np.uint8))
    return _outlined(base, enlarge_plane(to_plane(region), (width, height)))


def _outlined(pixels: np.ndarray, plane: np.ndarray) -> Image.Image:
    """Draw the line where `plane` crosses one half, two pixels wide with a dark rim, so that it shows on white and on black."""
    inside = np.pad(plane >= 0.5, 3)
    def grown(by: int) -> np.ndarray:
        mask = inside.copy()
        for shift in range(1, by + 1):
            for axis in (0, 1):
                mask |= np.roll(inside, shift, axis) | np.roll(inside, -shift, axis)
        return mask
    line = (grown(2) & ~inside)[3:-3, 3:-3]
    rim = (grown(3) & ~inside)[3:-3, 3:-3] & ~line
    pixels = pixels.copy()
    pixels[rim] *= 0.35
    pixels[line] = REGION_RGB
    return Image.fromarray(np.rint(np.clip(pixels, 0, 255)).astype(np.uint8))
