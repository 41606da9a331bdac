"""One file per family of formats. Each reader has `frames(path, settings)` and `read(path, frame, settings)`; content, not the extension, picks it."""

from __future__ import annotations

import gzip
import importlib
import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from ..errors import DataError, UnreadableImage
from ..limits import MAX_FILE_BYTES
from ..raw import Raw
from ..settings import ReadSettings

EXTENSIONS = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom", ".nii", ".nii.gz"}
"""Names that a folder or glob lists; files without an extension are listed where they begin as DICOM files do."""

_HAS_FRAMES = {"tiff", "dicom", "nifti"}
_SINGLE = {".png", ".jpg", ".jpeg"}

for _name in ("tifffile", "pydicom", "nibabel.global"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)  # they log file names and header values; refusals are ours to word


def is_image_name(path: Path) -> bool:
    """Whether a folder's file is listed: by extension, or, where it has none, by the mark of a DICOM file."""
    name = path.name.lower()
    if any(name.endswith(extension) for extension in EXTENSIONS):
        return True
    if path.suffix and not path.suffix[1:].isdigit():
        return False
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def frames(path: Path, settings: ReadSettings) -> list[str]:
    """Names of the images that a file holds, such as "z0" … "z23"; empty where it is one image, or cannot be read.

    Args:
        path: The file.
        settings: Of which `slice_axis` and `orientation` matter.
    """
    if path.suffix.lower() in _SINGLE:
        return []  # lists of a million such files are not opened one by one
    try:
        with _in_words():
            check_file(path)
            family = _family(path)
            return _reader(family).frames(path, settings) if family in _HAS_FRAMES else []
    except (UnreadableImage, OSError):
        return []  # reading it says why, and lets the run skip it


def read(path: Path, frame: str | None, settings: ReadSettings) -> Raw:
    """Decode one image.

    Args:
        path: The file.
        frame: One of `frames`, or None where the file is one image.
        settings: Of which `orientation` is used here.

    Raises:
        UnreadableImage: missing, truncated, no image, beyond a limit, or in need of another codec; the reason in words.
    """
    with _in_words():
        check_file(path)
        raw = _reader(_family(path)).read(path, frame, settings)
        if not raw.values.size:
            raise UnreadableImage("it holds no pixels")
        return raw


def check_file(path: Path) -> None:
    """Refuse what must not even be opened: a pipe waits for its writer, a device never ends.

    Raises:
        UnreadableImage: it is not there, no regular file, or larger than `MAX_FILE_BYTES`.
    """
    if not path.exists():
        raise UnreadableImage("there is no such file")
    if not path.is_file():
        raise UnreadableImage("it is no regular file")
    if os.stat(path).st_size > MAX_FILE_BYTES:
        raise UnreadableImage(f"it has more than {MAX_FILE_BYTES // 2**30} GiB, the limit of one file")


def _reader(family: str) -> ModuleType:
    return importlib.import_module(f".{family}", __name__)  # lazy: pydicom and nibabel take their time


def _family(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(352)
    if head[128:132] == b"DICM":
        return "dicom"
    if head[:8] == b"\x89PNG\r\n\x1a\n" or head[:3] == b"\xff\xd8\xff":
        return "pillow"
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    if head[:2] == b"\x1f\x8b":
        with gzip.open(path) as file:
            head = file.read(352)
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:12] in (b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n"):
        return "nifti"
    if not head:
        raise UnreadableImage("it is empty")
    if path.suffix.lower() in (".dcm", ".dicom"):
        return "dicom"  # old files lack the mark
    raise UnreadableImage("its content is none of PNG, JPEG, TIFF, DICOM and NIfTI")


@contextmanager
def _in_words() -> Iterator[None]:
    """Errors of the decoding libraries as `UnreadableImage`, without the paths and header values that they like to quote."""
    try:
        yield
    except DataError:
        raise
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UnreadableImage("there is no such file") from error
    except PermissionError as error:
        raise UnreadableImage("its permissions do not allow to read it") from error
    except MemoryError as error:
        raise UnreadableImage("it does not fit into memory") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableImage("it is truncated or damaged") from error
    except OSError as error:
        if error.errno is not None and error.strerror:
            raise UnreadableImage(f"it cannot be read ({error.strerror})") from error
        raise UnreadableImage("it is truncated or damaged") from error
    except Exception as error:  # decoders of hostile files raise anything: struct.error, KeyError, IndexError, their own
        raise UnreadableImage(f"it cannot be decoded ({type(error).__name__})") from error
