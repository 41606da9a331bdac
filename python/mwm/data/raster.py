"""PNG and JPEG through Pillow, TIFF through tifffile; 8 and 16 bit, grey and colour."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from mwm.data.decoded import Decoded, check_size
from mwm.data.errors import UnreadableImage

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
TIFF_SUFFIXES = (".tif", ".tiff")
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "PPM")


def decode_raster(path: Path, name: str, max_pixels: int) -> Decoded:
    """A PNG, JPEG or BMP. Transparency is dropped; palettes become colours; 16-bit values stay.

    Raises:
        UnreadableImage: truncated, of another format, or larger than `max_pixels`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images; the limit below refuses them
            with Image.open(path, formats=_FORMATS) as image:
                check_size(image.height, image.width, max_pixels, name=name, channels=len(image.getbands()))
                image.load()
                return Decoded(_channels_first(_plain(image)))
    except UnreadableImage:
        raise
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, OverflowError) as error:
        raise UnreadableImage(f"{name}: not a readable image ({_reason(error)}).") from error


def _plain(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode in ("I", "F"):
        return np.asarray(image).astype(np.float32)
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    if image.mode in ("L", "RGB"):
        return np.asarray(image)
    if image.mode in ("LA", "La"):
        return np.asarray(image.convert("LA"))[..., 0]
    if image.mode == "P" and image.getpalette() and _is_grey(image.getpalette()):
        return np.asarray(image.convert("L"))
    return np.asarray(image.convert("RGB"))


def _is_grey(palette: list[int]) -> bool:
    colours = np.asarray(palette).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())


def decode_tiff(path: Path, name: str, max_pixels: int, page: int = 0) -> Decoded:
    """One page of a TIFF, 8 or 16 bit or float, grey or colour.

    Raises:
        UnreadableImage: truncated, compressed in a way that no installed codec reads, or larger than `max_pixels`.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            sheet = file.pages[page]
            shape = sheet.shape
            height, width = sheet.imagelength, sheet.imagewidth
            check_size(int(height), int(width), max_pixels, name=name, channels=int(sheet.samplesperpixel))
            if int(np.prod(shape)) > 4 * max_pixels:
                raise UnreadableImage(f"{name}: declares {'x'.join(map(str, shape))} values, over the limit. If the file is right, raise max_pixels.")
            inverted = int(sheet.photometric) == 0
            values = sheet.asarray()
            planar = int(sheet.planarconfig) == 2 and values.ndim == 3
    except UnreadableImage:
        raise
    except Exception as error:  # tifffile raises whatever its codecs raise; Pillow reads some compressions that it does not
        try:
            return decode_raster(path, name, max_pixels)
        except UnreadableImage:
            raise UnreadableImage(f"{name}: not a readable TIFF ({_reason(error)}).") from error
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    if values.dtype not in (np.uint8, np.uint16):
        values = values.astype(np.float32)
    if inverted and values.dtype in (np.uint8, np.uint16):
        values = np.iinfo(values.dtype).max - values
    values = values if planar else _channels_first(values)
    return Decoded(values[:3] if values.shape[0] == 4 else values)


def tiff_pages(path: Path) -> int:
    """Number of pages of a TIFF; 1 where it cannot be told (reading will say why)."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            return max(1, len(file.pages))
    except Exception:  # a damaged file stays in the list as one image, and is reported when it is read
        return 1


def _channels_first(values: np.ndarray) -> np.ndarray:
    if values.ndim == 2:
        return values[None]
    if values.ndim == 3:
        return np.ascontiguousarray(values.transpose(2, 0, 1))
    raise UnreadableImage(f"an image must have two dimensions and channels, got {values.ndim} dimensions.")


def _reason(error: BaseException) -> str:
    """The kind of an error, without file names or texts of the file."""
    words = {"UnidentifiedImageError": "its format is not PNG, JPEG, BMP or TIFF", "DecompressionBombError": "it declares too many pixels"}
    text = str(error)
    if "truncated" in text:
        return "it is truncated"
    return words.get(type(error).__name__, type(error).__name__)
