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

_COLOUR = {"RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "RGBa"}


def read(path: Path, frame: str | None, settings: ReadSettings) -> Raw:
    """Decode a file of one image; alpha is dropped, palettes become grey where all their entries are."""
    if frame is not None:
        raise UnreadableImage("it holds one image, not several")
    deep = _sixteen_bit_colour(path)
    if deep is not None:
        return Raw(deep)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
        try:
            with Image.open(path) as image:
                check_pixels(*image.size, len(image.getbands()))
                return Raw(_values(image, settings), inverted=False)
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


def _sixteen_bit_colour(path: Path) -> NDArray[np.uint16] | None:
    """PNG with 16-bit colour or grey and alpha, which Pillow would cut to 8 bits; None for any other file. uint16 [C, H, W]"""
    with open(path, "rb") as file:
        head = file.read(26)
    if head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR" or head[24] != 16 or head[25] not in (2, 4, 6):
        return None
    bands = {2: 3, 4: 2, 6: 4}[head[25]]
    check_pixels(int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big"), bands)
    import torch
    from torchvision.io import decode_png

    try:
        values = decode_png(torch.from_numpy(np.fromfile(path, np.uint8))).numpy()
    except RuntimeError as error:
        raise UnreadableImage("it is truncated or damaged") from error
    return np.ascontiguousarray(values[: 1 if bands == 2 else 3].astype(np.uint16))
