"""From tensors to pictures: the one place that turns numbers into 8-bit pixels and colours.

Every picture of this room starts here. Inputs are torch tensors or numpy arrays; outputs are PIL images in RGB.
"""

from __future__ import annotations

import os
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

INK, MUTED, HAIRLINE, PAPER = "#16191d", "#667080", "#e2e5ea", "#ffffff"
SERIES = ("#0f766e", "#d9480f", "#4f46a5", "#8a6d1f", "#7a8699")
REGION_RGB = (255, 138, 31)
HIDDEN_RGB = (171, 178, 189)

_LETTERS = frozenset("\n©«°±´·»‘’“”…‹›") | {chr(code) for code in range(32, 127)}  # what Pillow's typeface can draw; of the rest it draws boxes
_INSTEAD = str.maketrans({"ß": "ss", "ẞ": "SS", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "đ": "d", "Đ": "D", "ł": "l", "Ł": "L", "ı": "i",
                          "×": "x", "–": "-", "—": "-", "−": "-", "‐": "-", "‑": "-"})

_HEAT = np.array([(9, 9, 32), (68, 18, 104), (148, 38, 103), (219, 72, 68), (249, 142, 9), (248, 214, 68), (253, 252, 204)], float)


def to_array(values: object) -> np.ndarray:
    """A float64 copy of a torch tensor or array-like, detached and on the host."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.double().numpy() if values.dtype.is_floating_point else values.numpy()
    return np.asarray(values)


def to_rgb(image: object) -> np.ndarray:
    """An image as 8-bit RGB.

    Args:
        image: float in [0, 1] (clamped, NaN becomes 0) or uint8. [C, H, W] or [H, W]; three channels are taken as RGB,
            any other number is averaged to grey.

    Returns:
        uint8 [H, W, 3]

    Raises:
        ValueError: the array has another number of axes.
    """
    pixels = to_array(image)
    if pixels.ndim == 2:
        pixels = pixels[None]
    if pixels.ndim != 3:
        raise ValueError(f"view: image must be [C, H, W] or [H, W], got {list(pixels.shape)}. Pass one image, not a batch.")
    if pixels.dtype == np.uint8:
        pixels = pixels / 255.0
    pixels = np.clip(np.nan_to_num(pixels.astype(float), nan=0.0), 0.0, 1.0)
    if pixels.shape[0] != 3:
        pixels = np.repeat(pixels.mean(0, keepdims=True), 3, 0)
    return np.rint(pixels.transpose(1, 2, 0) * 255).astype(np.uint8)


def to_plane(region: object) -> np.ndarray:
    """A region map as float [H, W] in [0, 1]; a leading axis of length 1 is dropped.

    Raises:
        ValueError: the map has another shape.
    """
    plane = to_array(region)
    if plane.ndim == 3 and plane.shape[0] == 1:
        plane = plane[0]
    if plane.ndim != 2:
        raise ValueError(f"view: region must be [H, W], got {list(plane.shape)}. Pass the map of one image.")
    return np.clip(np.nan_to_num(plane.astype(float), nan=0.0), 0.0, 1.0)


def heat_colours(plane: np.ndarray) -> np.ndarray:
    """Values in [0, 1] to colours of even lightness steps, from near black over red to pale yellow. [...] to uint8 [..., 3]"""
    position = np.clip(plane, 0, 1) * (len(_HEAT) - 1)
    knots = np.arange(len(_HEAT))
    return np.rint(np.stack([np.interp(position, knots, _HEAT[:, c]) for c in range(3)], -1)).astype(np.uint8)


def fit(height: int, width: int, size: int) -> tuple[int, int]:
    """(width, height) of a picture whose longer side is `size` pixels."""
    scale = size / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def enlarge(pixels: np.ndarray, size: int) -> Image.Image:
    """8-bit pixels [H, W, 3] as a picture with `size` pixels on its longer side."""
    return Image.fromarray(pixels).resize(fit(*pixels.shape[:2], size), Image.Resampling.BICUBIC)


def enlarge_plane(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A float map [H, W] resampled to `size` = (width, height), smoothly. [height, width]"""
    picture = Image.fromarray(plane.astype(np.float32), mode=None).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(picture, dtype=float)


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own typeface, so that a picture looks the same on every machine."""
    return ImageFont.load_default(size)


def drawable(text: str) -> str:
    """A text in the letters that `font` has: accents fall away, dashes become hyphens, any other letter becomes a question mark.

    The tables beside a picture keep the text as it is.
    """
    parts = unicodedata.normalize("NFKD", text.translate(_INSTEAD))
    return "".join(letter if letter in _LETTERS else "?" for letter in parts if letter in _LETTERS or not unicodedata.combining(letter))


def save(picture: Image.Image, path: str | Path) -> Path:
    """Write a picture whole or not at all (temporary file, then rename); folders are made. PNG without metadata."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=path.suffix or ".png")
    try:
        with os.fdopen(handle, "wb") as file:
            picture.save(file, format="PNG", optimize=True)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
