"""TIFF: 8 to 64 bits, grey, colour and any number of channels, single images and stacks, through tifffile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from ..errors import UnreadableImage
from ..limits import check_pixels
from ..raw import Raw
from ..settings import ReadSettings
from . import pillow


def frames(path: Path, settings: ReadSettings) -> list[str]:
    """"f0", "f1", … of a stack; empty for a single image."""
    with tifffile.TiffFile(path) as file:
        count = _frame_count(_series(file))
    return [f"f{k}" for k in range(count)] if count > 1 else []


def read(path: Path, frame: str | None, settings: ReadSettings) -> Raw:
    """Decode one image of the first series; alpha and other extra samples are dropped beside colour."""
    with tifffile.TiffFile(path) as file:
        series, page = _series(file), file.pages[0]
        count = _frame_count(series)
        index = _index(frame, count)
        per_frame = int(np.prod(series.shape)) // count
        check_pixels(per_frame)
        if page.photometric in (tifffile.PHOTOMETRIC.PALETTE, tifffile.PHOTOMETRIC.YCBCR, tifffile.PHOTOMETRIC.CIELAB):
            return _by_pillow(path, frame, settings, count)
        if count > 1:
            check_pixels(per_frame * count // 16)  # a stack is decoded page by page where it can be
        try:
            values, axes = _frame(file, series, index, count)
        except (ValueError, ImportError, RuntimeError) as error:
            if page.compression == tifffile.COMPRESSION.NONE:
                raise UnreadableImage("it is truncated or damaged") from error
            return _by_pillow(path, frame, settings, count)
        inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
        if page.photometric == tifffile.PHOTOMETRIC.RGB:
            values = np.moveaxis(values, axes.index("S"), 0)[:3] if "S" in axes else values
        elif "S" in axes:
            values = np.moveaxis(values, axes.index("S"), 0)
            values = values[: len(values) - len(page.extrasamples)] if 0 < len(page.extrasamples) < len(values) and page.extrasamples[0] in (1, 2) else values
        if values.ndim == 2:
            values = values[None]
        if values.ndim != 3:
            raise UnreadableImage(f"its {values.ndim} dimensions are not those of an image")
        if values.dtype == bool:
            values = values.astype(np.uint8) * 255
        if values.dtype.kind not in "uif":
            raise UnreadableImage("its values are no real numbers")
        return Raw(np.ascontiguousarray(values), inverted=inverted)


def _series(file: tifffile.TiffFile) -> tifffile.TiffPageSeries:
    if not file.series:
        raise UnreadableImage("it holds no image")
    series = file.series[0]
    if "Y" not in series.axes or "X" not in series.axes:
        raise UnreadableImage("it holds no image")
    return series


def _frame_count(series: tifffile.TiffPageSeries) -> int:
    count = 1
    for name, length in zip(series.axes, series.shape, strict=True):
        if name not in "YXSC":
            count *= length
    return count


def _index(frame: str | None, count: int) -> int:
    if frame is None:
        if count > 1:
            raise UnreadableImage(f"it holds {count} images; pass the record of one of them")
        return 0
    if not (frame[:1] == "f" and frame[1:].isdigit() and int(frame[1:]) < count):
        raise UnreadableImage(f"it has no image {frame!r}")
    return int(frame[1:])


def _frame(file: tifffile.TiffFile, series: tifffile.TiffPageSeries, index: int, count: int) -> tuple[NDArray, str]:
    """One image, its channels (axis C) first, and its axes."""
    if count > 1 and len(series.pages) == count and "C" not in series.axes:
        page = series.pages[index]
        return page.asarray(), page.axes
    check_pixels(int(np.prod(series.shape)))
    values, axes = series.asarray(), series.axes
    outer = [k for k, name in enumerate(axes) if name not in "YXSC"]
    inner = [k for k, name in enumerate(axes) if name in "YXSC"]
    values = values.transpose(*outer, *inner).reshape(count, *(series.shape[k] for k in inner))[index]
    axes = "".join(axes[k] for k in inner)
    if "C" in axes:
        if "S" in axes:
            raise UnreadableImage("it has both channels and samples")
        return np.moveaxis(values, axes.index("C"), 0), axes.replace("C", "")
    return values, axes


def _by_pillow(path: Path, frame: str | None, settings: ReadSettings, count: int) -> Raw:
    if count > 1:
        raise UnreadableImage("it is a compressed stack that needs the package imagecodecs; install it, or store one image per file")
    return pillow.read(path, None, settings)
