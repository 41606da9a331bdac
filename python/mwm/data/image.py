"""From a file to an image in [0, 1]: decode, map intensities, bring to size; and masks the same way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mwm.data import dicom, nifti, raster
from mwm.data.decoded import Decoded
from mwm.data.errors import DataError, UnreadableImage
from mwm.data.settings import ReadSettings

if TYPE_CHECKING:
    from mwm.data.records import Record

SUFFIXES = (*raster.SUFFIXES, *raster.TIFF_SUFFIXES, *dicom.SUFFIXES, *nifti.SUFFIXES)


def kind_of(path: Path) -> str | None:
    """The reader of a file, by its suffix; "raster", "tiff", "dicom", "nifti" or None."""
    name = path.name.lower()
    for kind, suffixes in (("raster", raster.SUFFIXES), ("tiff", raster.TIFF_SUFFIXES), ("dicom", dicom.SUFFIXES), ("nifti", nifti.SUFFIXES)):
        if name.endswith(suffixes):
            return kind
    return None


def decode(source: Path | str | Record, settings: ReadSettings) -> Decoded:
    """Pixel values of one image as stored; see `read_image`."""
    path, frame = (Path(source), None) if isinstance(source, (str, Path)) else (Path(source.path), source.frame)
    name = path.name if isinstance(source, (str, Path)) else source.name
    if not path.is_file():
        raise UnreadableImage(f"{name}: there is no such file.")
    kind = kind_of(path) or ("dicom" if dicom.is_dicom(path) else "raster")
    if kind == "raster":
        return raster.decode_raster(path, name, settings.max_pixels)
    if kind == "tiff":
        return raster.decode_tiff(path, name, settings.max_pixels, frame or 0)
    if kind == "dicom":
        return dicom.decode_dicom(path, name, settings.max_pixels, frame or 0)
    return nifti.decode_nifti(path, name, settings, frame)


def read_image(source: Path | str | Record, settings: ReadSettings | None = None, channels: int | None = None) -> Tensor:
    """Read one image.

    Args:
        source: a record of `read_list`, or a file (of a volume: its middle slice, of several frames: the first).
        settings: intensities, size, orientation; the defaults where left out.
        channels: 1 turns colour into its grey (ITU-R 601 weights), n > 1 repeats grey; None keeps what the file has.

    Returns:
        float32 in [0, 1]. [C, H, W]

    Raises:
        UnreadableImage: the file is damaged, of another kind, too large, or has another number of channels.
    """
    settings = settings or ReadSettings()
    decoded = decode(source, settings)
    image = torch.from_numpy(_map(decoded, settings))
    image = _channels(image, channels, getattr(source, "name", None) or Path(str(source)).name)
    return image if settings.size is None else fit(image, settings.size, settings.aspect)


def read_mask(path: str | Path, size: tuple[int, int] | None = None, *, frame: int | None = None, settings: ReadSettings | None = None) -> Tensor:
    """Read a mask: 0 is outside, everything above is inside; grey values between 0 and the maximum are kept as shares.

    Args:
        path: PNG, TIFF, DICOM or NIfTI; labels 1, 2, … count as inside.
        size: (height, width) that it must have, pixels; None takes any.
        frame: slice of a volume, taken as `read_image` takes it.

    Returns:
        float32 in [0, 1]. [H, W]

    Raises:
        DataError: another size. UnreadableImage: cannot be read.
    """
    path = Path(path)
    settings = settings or ReadSettings()
    kind = kind_of(path)
    values = (nifti.decode_nifti(path, path.name, settings, frame) if kind == "nifti" else decode(path, settings)).values
    mask = np.nan_to_num(values.astype(np.float32)).max(axis=0)
    levels = np.unique(mask)
    if len(levels) <= 32:  # labels, or a plain mask: inside is inside
        mask = (mask > 0).astype(np.float32)
    else:
        mask = np.clip(mask / (255.0 if values.dtype == np.uint8 else max(float(mask.max()), 1e-12)), 0, 1)
    if size is not None and mask.shape != tuple(size):
        raise DataError(f"{path.name}: mask must be {size[0]}x{size[1]} pixels like its image, got {mask.shape[0]}x{mask.shape[1]}. Resize the mask.")
    return torch.from_numpy(np.ascontiguousarray(mask, dtype=np.float32))


def _map(decoded: Decoded, settings: ReadSettings) -> np.ndarray:
    """Stored values to float32 in [0, 1]."""
    values = decoded.values
    stored_8bit = values.dtype == np.uint8
    mode, window = settings.intensity, settings.window()
    if mode == "auto":
        if stored_8bit:
            return values.astype(np.float32) / np.float32(255)
        window = decoded.window
        mode = "percentile"
    values = values.astype(np.float32)
    finite = np.isfinite(values)
    if not finite.any():
        raise UnreadableImage("an image must have finite values, got none.")
    if window is not None:
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
    elif mode == "minmax":
        low, high = decoded.extremes or (float(values[finite].min()), float(values[finite].max()))
    else:
        low, high = decoded.bounds or tuple(float(v) for v in np.percentile(values[finite], (0.5, 99.5)))
    values = np.where(finite, values, np.float32(low))
    if high <= low:  # an image of one value has no range to stretch
        return np.zeros_like(values)
    return np.clip((values - np.float32(low)) / np.float32(high - low), 0, 1).astype(np.float32)


def _channels(image: Tensor, channels: int | None, name: str) -> Tensor:
    have = image.shape[0]
    if channels is None or channels == have:
        return image
    if channels == 1 and have == 3:
        return (image * image.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
    if have == 1:
        return image.expand(channels, -1, -1).contiguous()
    raise UnreadableImage(f"{name}: image must have {channels} channels, got {have}. Convert it, or choose other channels.")


def fit(image: Tensor, size: tuple[int, int], aspect: str) -> Tensor:
    """Bring an image (or map) to a size, antialiased. [C, H, W] -> [C, *size]

    Args:
        size: (height, width), pixels.
        aspect: "pad" with 0 around, "stretch", or "crop" to the centre.
    """
    height, width = image.shape[1:]
    if (height, width) == tuple(size):
        return image
    if aspect == "stretch":
        return _resize(image, size)
    scale = (min if aspect == "pad" else max)(size[0] / height, size[1] / width)
    inner = max(1, round(height * scale)), max(1, round(width * scale))
    image = _resize(image, inner)
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    if aspect == "pad":
        top, left = max(top, 0), max(left, 0)
        return F.pad(image, (left, size[1] - inner[1] - left, top, size[0] - inner[0] - top)).contiguous()
    return image[:, -top : -top + size[0], -left : -left + size[1]].contiguous()


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(image.shape[1:]) == tuple(size):
        return image
    return F.interpolate(image[None], tuple(size), mode="bilinear", align_corners=False, antialias=True)[0].clamp(0, 1)
