"""DICOM through pydicom: rescale, window, MONOCHROME1, palettes, multi-frame. Only what the pixels need is read; no text leaves this file."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32

from ..errors import UnreadableImage
from ..limits import check_pixels
from ..raw import Raw
from ..settings import ReadSettings

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_LONGEST_ELEMENT = 1 << 20  # bytes of an element of group 2
_SPACINGS = (1e-6, 1e6)  # mm; beyond, it is no pixel's
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
        if not _stands_at_deflated(file):
            return
        inflate, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
        data = file.read(1 << 16)
        while data:
            total += len(inflate.decompress(data, 1 << 20))
            if total > MAX_INFLATED:
                raise UnreadableImage(f"it inflates to more than {MAX_INFLATED // 2**20} MiB, the limit of a deflated DICOM file")
            data = inflate.unconsumed_tail or file.read(1 << 16)


def _stands_at_deflated(file: BinaryIO) -> bool:
    """Go past the elements of group 2, one by one as pydicom does; whether what follows is deflated. The length of the group that a file states may be wrong or missing."""
    if file.read(132)[128:] != b"DICM":
        file.seek(0)
    deflated = False
    while True:
        at, head = file.tell(), file.read(8)
        if head[:2] != b"\2\0":
            file.seek(at)
            return deflated
        kind, length = head[4:6].decode("latin-1"), int.from_bytes(head[6:], "little")
        if kind in EXPLICIT_VR_LENGTH_32:
            length = int.from_bytes(file.read(4), "little")
        if not (kind.isascii() and kind.isalpha() and kind.isupper()) or length > _LONGEST_ELEMENT:
            # Values without types, or of open length: pydicom has ways of its own to find their end, which may be another one than ours.
            file.seek(0)
            if _DEFLATED in file.read():
                raise UnreadableImage("the head of this deflated file is damaged")
            return False
        deflated |= _DEFLATED in file.read(length)


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
            if isinstance(value, (pydicom.multival.MultiValue, list, tuple)) and len(value) == 2:
                height, width = _number(value[0], 0.0), _number(value[1], 0.0)
                if _SPACINGS[0] <= min(height, width) and max(height, width) <= _SPACINGS[1]:
                    return height, width
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
