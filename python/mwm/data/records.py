"""The list of images: a folder, a glob, a text list or an index CSV, checked before anything is read."""

from __future__ import annotations

import csv
import glob as globbing
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import overload

from mwm.data import dicom, nifti, raster
from mwm.data.errors import DataError
from mwm.data.image import SUFFIXES, kind_of
from mwm.data.settings import ReadSettings

COLUMNS = ("file", "split", "label", "patient", "mask", "boxes", "prompt")
"""The columns of an index CSV; only `file` is required, others are ignored."""

MAX_FILES = 5_000_000
MAX_LIST_BYTES = 1 << 30


@dataclass(frozen=True)
class Record:
    """One image of a list.

    Attributes:
        path: the file.
        name: path relative to the root of the list, with forward slashes; a slice or frame n of a file adds "#n".
        id: 32 bits of BLAKE2b of `name`; identifies the image wherever masks or random numbers are drawn.
        frame: slice of a volume or frame of a file with several; None for a plain image.
        split, label, patient, mask, boxes, prompt: of the index CSV; None where empty. `mask` is a path, `boxes` a list
            of {"label": …, "bbox_xyxy": [x0, y0, x1, y1]} in pixels.
    """

    path: Path
    name: str
    id: int
    frame: int | None = None
    split: str | None = None
    label: str | None = None
    patient: str | None = None
    mask: Path | None = None
    boxes: list | None = None
    prompt: str | None = None

    @property
    def hashed(self) -> str:
        """The id as 8 hexadecimal digits: the name of this image in everything that may be shared."""
        return f"{self.id:08x}"


class ImageList(Sequence[Record]):
    """The images of a run, sorted by name.

    Attributes:
        root: folder that the names start from.
    """

    def __init__(self, records: Sequence[Record], root: Path) -> None:
        self._records, self.root = tuple(records), root

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> ImageList: ...
    def __getitem__(self, index):
        return ImageList(self._records[index], self.root) if isinstance(index, slice) else self._records[index]


def image_id(name: str) -> int:
    """32 bits of BLAKE2b of a relative name."""
    return int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "big")


def read_list(images: str | Path | Sequence[Record], *, split: str | None = None, root: str | Path | None = None,
              settings: ReadSettings | None = None) -> ImageList:
    """Find the images.

    Args:
        images: a folder (searched recursively), a glob, a text file with one path per line, or an index CSV with the
            columns of `COLUMNS`. Paths in lists are relative to the list's folder.
        split: only rows of this split (index CSV).
        root: folder that the paths of a list are relative to, and must stay in.
        settings: orientation and slice axis, which decide how many slices a volume has.

    Returns:
        The images in the order of their names, volumes and multi-frame files slice by slice.

    Raises:
        DataError: nothing found, a missing column, a path outside the root, a file listed twice.
    """
    if not isinstance(images, (str, Path)):
        return ImageList(list(images), Path(root or "."))
    text, path = str(images), Path(images).expanduser()
    if path.is_dir():
        base = path.resolve()
        if (path / "index.csv").is_file() and split is not None:
            return read_list(path / "index.csv", split=split, root=root, settings=settings)
        found = [Record(file, file.relative_to(base).as_posix(), 0) for file in _walk(base)]
        where = f"folder {text}"
    elif path.is_file() and path.suffix.lower() == ".csv":
        base = Path(root).expanduser().resolve() if root else path.parent.resolve()
        found, where = _from_csv(path, base), f"index {text}"
    elif path.is_file() and path.suffix.lower() in (".txt", ".lst", ".list"):
        base = Path(root).expanduser().resolve() if root else path.parent.resolve()
        lines = [line.strip() for line in _text(path).splitlines()]
        found = [Record(inside(base, line, path.name), _relative(base, line), 0) for line in lines if line and not line.startswith("#")]
        where = f"list {text}"
    elif path.is_file():
        base = path.parent.resolve()
        found, where = [Record(path.resolve(), path.name, 0)], text
    elif globbing.has_magic(text):
        base = _glob_base(path)
        files = sorted(Path(f) for f in globbing.glob(str(path), recursive=True) if Path(f).is_file() and kind_of(Path(f)))
        found = [Record(inside(base, str(f.resolve().relative_to(base)) if f.resolve().is_relative_to(base) else str(f), "glob"),
                        f.absolute().relative_to(base).as_posix(), 0) for f in files]
        where = f"glob {text}"
    else:
        raise DataError(f"images: there is no file or folder {text}. Give a folder, a glob, a .txt list or an index CSV.")
    if split is not None:
        splits = sorted({r.split for r in found if r.split})
        found = [r for r in found if r.split == split]
        if not found:
            raise DataError(f"images: split must be one of {', '.join(splits) or '(the list has no column split)'}, got {split!r}.")
    if not found:
        raise DataError(f"images: {where} holds no image. Readable are {', '.join(SUFFIXES)} and DICOM files without a suffix.")
    return ImageList(_identified(list(_expanded(found, settings or ReadSettings()))), base)


def _walk(base: Path) -> Iterator[Path]:
    """Image files below a folder, sorted; links are followed once and only where they stay inside."""
    seen: set[tuple[int, int]] = set()
    count = 0
    files: list[Path] = []
    for folder, folders, names in os.walk(base, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back up
            folders[:] = []
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith(".") and Path(folder, f).resolve().is_relative_to(base))
        for name in names:
            count += 1
            if count > MAX_FILES:
                raise DataError(f"images: more than {MAX_FILES} files below the folder. Give a narrower folder or a list.")
            file = Path(folder, name)
            if name.startswith(".") or not file.resolve().is_relative_to(base) or not file.is_file():
                continue
            if kind_of(file) or (not file.suffix and dicom.is_dicom(file)):
                files.append(file)
    yield from sorted(files)


def _from_csv(path: Path, base: Path) -> list[Record]:
    reader = csv.DictReader(_text(path).splitlines())
    columns = [c.strip() for c in reader.fieldnames or []]
    reader.fieldnames = columns
    if "file" not in columns:
        raise DataError(f"images: index {path.name} must have a column file, got {', '.join(columns) or 'none'}. The schema is {', '.join(COLUMNS)}.")
    records = []
    for number, row in enumerate(reader, 2):
        values = {key: (row.get(key) or "").strip() or None for key in COLUMNS}
        if values["file"] is None:
            raise DataError(f"images: line {number} of {path.name} has no file.")
        mask = inside(base, values["mask"], path.name) if values["mask"] else None
        records.append(Record(inside(base, values["file"], path.name), _relative(base, values["file"]), 0, None, values["split"], values["label"],
                              values["patient"], mask, _boxes(values["boxes"], number, path.name), values["prompt"]))
    return records


def _boxes(text: str | None, line: int, name: str) -> list | None:
    if text is None:
        return None
    try:
        boxes = json.loads(text)
        good = isinstance(boxes, list) and all(isinstance(b, dict) and len(b.get("bbox_xyxy", ())) == 4 for b in boxes)
    except (ValueError, TypeError):
        good = False
    if not good:
        raise DataError(f'images: boxes in line {line} of {name} must be a JSON list of {{"label", "bbox_xyxy": [x0, y0, x1, y1]}}.')
    return boxes


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_LIST_BYTES:
        raise DataError(f"images: list {path.name} is larger than {MAX_LIST_BYTES >> 20} MiB. Split it.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"images: list {path.name} must be UTF-8 text. Save it so.") from error


def inside(base: Path, name: str, listed_in: str) -> Path:
    """A listed path, which must stay below the root, links resolved.

    Raises:
        DataError: it leads out.
    """
    if "\0" in name:
        raise DataError(f"images: a path in {listed_in} holds a zero byte.")
    path = base / name
    if not path.resolve().is_relative_to(base):
        raise DataError(f"images: {name!r} in {listed_in} leads out of {base.name}. Lists may only name files below their root; give --root.")
    return path


def _relative(base: Path, name: str) -> str:
    path = Path(name)
    return path.relative_to(base).as_posix() if path.is_absolute() and path.is_relative_to(base) else Path(os.path.normpath(path)).as_posix()


def _glob_base(path: Path) -> Path:
    parts = path.absolute().parts
    plain = next(i for i, part in enumerate(parts) if globbing.has_magic(part))
    return Path(*parts[:plain]).resolve()


def _expanded(records: list[Record], settings: ReadSettings) -> Iterator[Record]:
    """Files with several images, one record each."""
    for record in records:
        kind = kind_of(record.path)
        if kind == "nifti":
            count = nifti.nifti_slices(record.path, settings)
        elif kind == "dicom" or (kind is None and not record.path.suffix):
            count = dicom.dicom_frames(record.path)
        elif kind == "tiff":
            count = raster.tiff_pages(record.path)
        else:
            count = 1
        if count == 1 and kind != "nifti":
            yield record
        else:
            for frame in range(count):
                yield replace(record, name=f"{record.name}#{frame}", frame=frame)


def _identified(records: list[Record]) -> list[Record]:
    """Sorted, with ids; of two names with one hash, the later takes the next free number."""
    records.sort(key=lambda r: (r.name.split("#")[0], r.frame or 0))
    used: set[int] = set()
    result = []
    for before, record in zip([None, *records[:-1]], records, strict=True):
        if before is not None and before.name == record.name:
            raise DataError(f"images: {record.name} is listed twice. Remove one.")
        number = image_id(record.name)
        while number in used:
            number = (number + 1) % 2**32
        used.add(number)
        result.append(replace(record, id=number))
    return result
