"""PNG and JPEG, and TIFF in codecs that tifffile lacks, through Pillow."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..errors import UnreadableImage
from ..limits import check_pixels
from ..raw import Raw
from ..settings import ReadSettings
from .deep_png import read_deep_png

_COLOUR = {"RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "RGBa"}


def read(path: Path, frame: str | None, settings: ReadSettings) -> Raw:
    """Decode a file of one image; alpha is dropped, palettes become grey where all their entries are."""
    if frame is not None:
        raise UnreadableImage("it holds one image, not several")
    deep = read_deep_png(path)
    if deep is not None:
        return Raw(deep)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
        try:
            with Image.open(path) as image:
                check_pixels(*image.size[::-1], len(image.getbands()))
                return Raw(_values(image, settings))
        except Image.DecompressionBombError as error:
            raise UnreadableImage("it claims more pixels than the limit allows; crop or shrink it first") from error
        except Image.UnidentifiedImageError as error:
            raise UnreadableImage("it is truncated or damaged") from error


def _values(image: Image.Image, settings: ReadSettings) -> NDArray:
    image.load()
    if settings.orientation == "canonical":
        image = ImageOps.exif_transpose(image)
    if image.mode in ("P", "PA"):
        image = image.convert("RGB")
        values = np.asarray(image)
        if (values == values[..., :1]).all():
            values = values[..., :1]
        return np.ascontiguousarray(np.moveaxis(values, 2, 0))
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("LA", "La"):
        image = image.getchannel(0)
    elif image.mode in _COLOUR and image.mode != "RGB":
        image = image.convert("RGB")
    values = np.asarray(image)
    if values.dtype.byteorder not in ("=", "|"):
        values = values.astype(values.dtype.newbyteorder("="))
    return np.ascontiguousarray(values[None] if values.ndim == 2 else np.moveaxis(values, 2, 0))
