"""DICOM through pydicom: rescale, window, MONOCHROME1, palettes, multi-frame. Only what the pixels need is read; no text leaves this file."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

from ..errors import UnreadableImage
from ..limits import check_pixels
from ..raw import Raw
from ..settings import ReadSettings

_DEFLATED = b"1.2.840.10008.1.2.1.99"
MAX_INFLATED = 2**29
"""Size of a deflated DICOM file after inflation, bytes."""


def frames(path: Path, settings: ReadSettings) -> list[str]:
    """"f0", "f1", … of a multi-frame file; empty for a single image."""
    header = _open(path, stop_before_pixels=True, specific_tags=["NumberOfFrames", "Rows"])
    count = int(header.get("NumberOfFrames") or 1)
    if count < 2:
        return []
    return [f"f{k}" for k in range(min(count, 100_000))]


def read(path: Path, frame: str | None, settings: ReadSettings) -> Raw:
    """Decode one frame; values after the modality transform (HU for CT)."""
    header = _open(path)
    if not any(name in header for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise UnreadableImage("it holds no pixel data (a report, a plan or a structure set)")
    count = int(header.get("NumberOfFrames") or 1)
    index = _index(frame, count)
    check_pixels(int(header.get("Rows") or 0), int(header.get("Columns") or 0), int(header.get("SamplesPerPixel") or 1))
    values = _pixels(header, index)
    photometric = str(header.get("PhotometricInterpretation", "MONOCHROME2")).upper()
    if photometric == "PALETTE COLOR":
        values = apply_color_lut(values, header)
        values = (values >> 8).astype(np.uint8) if values.dtype == np.uint16 else values
    if values.ndim == 3:
        return Raw(np.ascontiguousarray(np.moveaxis(values[..., :3], 2, 0)))
    if values.ndim != 2:
        raise UnreadableImage(f"its {values.ndim} dimensions are not those of an image")
    shared = [_item(header, "SharedFunctionalGroupsSequence", 0), _item(header, "PerFrameFunctionalGroupsSequence", index)]
    values = _rescale(values, header, shared)
    return Raw(
        np.ascontiguousarray(values)[None],
        is_ct=str(header.get("Modality", "")).upper() == "CT",
        window=_window(header, shared),
        inverted=photometric == "MONOCHROME1",
        spacing=_spacing(header, shared),
    )


def _open(path: Path, **options: Any) -> pydicom.Dataset:
    _check_inflated(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom quotes header values in its warnings
        try:
            return pydicom.dcmread(path, **options)
        except InvalidDicomError as error:
            header = pydicom.dcmread(path, force=True, **options)
            if "Rows" not in header:
                raise UnreadableImage("its content is no DICOM") from error
            if not getattr(header.file_meta, "TransferSyntaxUID", None):
                header.file_meta = pydicom.dataset.FileMetaDataset()
                header.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian  # the standard's default
            return header


def _check_inflated(path: Path) -> None:
    """Refuse a deflated file that grows beyond the limit: pydicom inflates it whole, before anything can be asked of it."""
    with open(path, "rb") as file:
        head = file.read(1024)
        if head[128:132] != b"DICM" or _DEFLATED not in head or head[132:140] != b"\2\0\0\0UL\4\0":
            return
        file.seek(144 + int.from_bytes(head[140:144], "little"))
        inflate, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
        data = file.read(1 << 16)
        while data:
            total += len(inflate.decompress(data, 1 << 20))
            if total > MAX_INFLATED:
                raise UnreadableImage(f"it inflates to more than {MAX_INFLATED // 2**20} MiB, the limit of a deflated DICOM file")
            data = inflate.unconsumed_tail or file.read(1 << 16)


def _index(frame: str | None, count: int) -> int:
    if frame is None:
        if count > 1:
            raise UnreadableImage(f"it holds {count} frames; pass the record of one of them")
        return 0
    if not (frame[:1] == "f" and frame[1:].isdigit() and int(frame[1:]) < count):
        raise UnreadableImage(f"it has no frame {frame!r}")
    return int(frame[1:])


def _pixels(header: pydicom.Dataset, index: int) -> Any:
    syntax = header.file_meta.get("TransferSyntaxUID") if hasattr(header, "file_meta") else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return pixel_array(header, index=index)
        except (RuntimeError, NotImplementedError, ImportError) as error:
            if syntax is not None and syntax.is_compressed:
                name = syntax.name if syntax.name and syntax.name != str(syntax) else "not known"
                raise UnreadableImage(f"its compression ({name}) cannot be decoded here: the file is damaged, or the packages "
                                      "pylibjpeg[all] are missing; install them, or decompress it") from error
            raise UnreadableImage("its pixel data are damaged") from error
        except (ValueError, AttributeError) as error:
            raise UnreadableImage("its pixel data are truncated, or do not fit its size") from error


def _item(header: pydicom.Dataset, name: str, index: int) -> Any:
    sequence = header.get(name)
    return sequence[index] if sequence and len(sequence) > index else None


def _nested(groups: list[Any], name: str) -> Any:
    """The first item of a functional group's sequence; what is said per frame goes before what is shared."""
    for group in reversed(groups):
        item = _item(group, name, 0) if group is not None else None
        if item is not None:
            return item
    return None


def _rescale(values: Any, header: pydicom.Dataset, groups: list[Any]) -> Any:
    transform = _nested(groups, "PixelValueTransformationSequence")
    source = transform if transform is not None and "RescaleSlope" in transform else header
    if source is header and header.get("ModalityLUTSequence"):
        return apply_modality_lut(values, header)
    slope, intercept = _number(source.get("RescaleSlope"), 1.0), _number(source.get("RescaleIntercept"), 0.0)
    if (slope, intercept) == (1.0, 0.0):
        return values
    return values.astype(np.float64) * slope + intercept


def _window(header: pydicom.Dataset, groups: list[Any]) -> tuple[float, float] | None:
    source = _nested(groups, "FrameVOILUTSequence")
    source = source if source is not None and "WindowCenter" in source else header
    centre, width = _number(source.get("WindowCenter"), np.nan), _number(source.get("WindowWidth"), np.nan)
    return (centre, width) if np.isfinite(centre) and width > 0 else None


def _spacing(header: pydicom.Dataset, groups: list[Any]) -> tuple[float, float] | None:
    measures = _nested(groups, "PixelMeasuresSequence")
    for source in (measures, header):
        for name in ("PixelSpacing", "ImagerPixelSpacing"):
            value = source.get(name) if source is not None else None
            if value is not None and len(value) == 2 and min(float(value[0]), float(value[1])) > 0:
                return float(value[0]), float(value[1])
    return None


def _number(value: Any, default: float) -> float:
    """A number, the first of several; the default for what is none."""
    try:
        if isinstance(value, (pydicom.multival.MultiValue, list, tuple)):
            value = value[0]
        number = float(value)
    except (TypeError, ValueError, IndexError):
        return default
    return number if np.isfinite(number) else default
