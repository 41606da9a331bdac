"""DICOM through pydicom: rescale, window, MONOCHROME1, multi-frame. No header field leaves this file but numbers of pixels."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from mwm.data.decoded import Decoded, check_size
from mwm.data.errors import UnreadableImage

SUFFIXES = (".dcm", ".dicom", ".ima")
_WANTED = ["Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"]


def is_dicom(path: Path) -> bool:
    """Whether a file without a known suffix carries the DICOM mark."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def dicom_frames(path: Path) -> int:
    """Number of frames; 1 where it cannot be told (reading will say why)."""
    import pydicom

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["NumberOfFrames"], force=True)
        return max(1, int(header.get("NumberOfFrames", 1) or 1))
    except Exception:  # a damaged file stays in the list as one image, and is reported when it is read
        return 1


def decode_dicom(path: Path, name: str, max_pixels: int, frame: int = 0) -> Decoded:
    """One frame, rescaled to its stored units (Hounsfield for CT), MONOCHROME1 turned so that bright is dense.

    Raises:
        UnreadableImage: no pixels, a compression without a decoder, a damaged file, or larger than `max_pixels`.
    """
    import pydicom

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns of values, which may be a patient's
            data = pydicom.dcmread(path, force=False)
            if "PixelData" not in data and "FloatPixelData" not in data and "DoubleFloatPixelData" not in data:
                raise UnreadableImage(f"{name}: a DICOM without an image. Leave reports and structure sets out of the list.")
            height, width = int(data.Rows), int(data.Columns)
            frames = max(1, int(data.get("NumberOfFrames", 1) or 1))
            samples = int(data.get("SamplesPerPixel", 1))
            check_size(height, width, max_pixels, name=name, channels=samples)
            if not 0 <= frame < frames:
                raise UnreadableImage(f"{name}: frame must be below {frames}, got {frame}.")
            values = _pixels(data, frame, frames)
            return _finish(data, values, samples, frame)
    except UnreadableImage:
        raise
    except Exception as error:  # decoders raise whatever they like, and their texts may quote the header
        kind = type(error).__name__
        hint = " Its compression needs a decoder: pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg." if kind in (
            "RuntimeError", "NotImplementedError") else ""
        raise UnreadableImage(f"{name}: not a readable DICOM ({kind}).{hint}") from None


def _pixels(data: Any, frame: int, frames: int) -> np.ndarray:
    from pydicom.pixels import pixel_array

    if frames > 1:
        return pixel_array(data, index=frame)
    return data.pixel_array


def _finish(data: Any, values: np.ndarray, samples: int, frame: int) -> Decoded:
    kind = str(data.get("PhotometricInterpretation", "MONOCHROME2"))
    if samples > 1:
        if kind.startswith("YBR"):
            from pydicom.pixels import convert_color_space

            values = convert_color_space(values, kind, "RGB") if kind not in ("YBR_ICT", "YBR_RCT") else values
        return Decoded(np.ascontiguousarray(values.transpose(2, 0, 1)[:3]).astype(np.uint8 if values.dtype == np.uint8 else np.float32))
    slope, intercept = _rescale(data, frame)
    values = values.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    window = _window(data, frame)
    if kind == "MONOCHROME1":
        low, high = float(values.min()), float(values.max())
        values = (low + high) - values
        window = None if window is None else ((low + high) - window[0], window[1])
    return Decoded(values[None], window=window)


def _group(data: Any, frame: int, name: str) -> Any:
    """A functional group of an enhanced multi-frame file: the frame's own, else the shared one."""
    for sequence, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        groups = data.get(sequence)
        if groups and index < len(groups) and groups[index].get(name):
            return groups[index].get(name)[0]
    return data


def _rescale(data: Any, frame: int) -> tuple[float, float]:
    source = _group(data, frame, "PixelValueTransformationSequence")
    return float(source.get("RescaleSlope", 1) or 1), float(source.get("RescaleIntercept", 0) or 0)


def _window(data: Any, frame: int) -> tuple[float, float] | None:
    source = _group(data, frame, "FrameVOILUTSequence")
    centre, width = source.get("WindowCenter"), source.get("WindowWidth")
    if centre is None or width is None:
        return None
    try:  # several windows may be stored; the first is the one meant for display
        centre = float(centre[0] if hasattr(centre, "__len__") and not isinstance(centre, str) else centre)
        width = float(width[0] if hasattr(width, "__len__") and not isinstance(width, str) else width)
    except (TypeError, ValueError, IndexError):
        return None
    return (centre, width) if width > 0 and np.isfinite(centre) else None
