"""Text lists and index CSVs.

The one schema of an index CSV, for all commands (other columns are ignored; only `file` is required; an empty cell is no value):

| column  | meaning |
|---------|---------|
| file    | path of the image relative to the CSV's folder (or to `root`), forward slashes; "#z12" behind it picks one slice of a volume |
| split   | name of the split, for example train, val, test |
| label   | class |
| patient | id of the patient; splits and intervals keep a patient's images together |
| mask    | path of a mask of the region, relative like `file` |
| boxes   | JSON list of {"label": …, "bbox_xyxy": [x0, y0, x1, y1]}, pixels of the stored image |
| prompt  | text of the region in this image; goes before the command line's |
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .errors import DataError
from .limits import MAX_FILES, MAX_LIST_BYTES
from .walk import check_inside

COLUMNS = ("file", "split", "label", "patient", "mask", "boxes", "prompt")
_FIELD = 4 * 2**20  # characters of one cell


@dataclass(frozen=True)
class Row:
    """One line of a list: `file` relative to the root, `frame` behind "#", and the other columns."""

    file: str
    frame: str | None = None
    split: str | None = None
    label: str | None = None
    patient: str | None = None
    mask: str | None = None
    boxes: tuple[dict[str, Any], ...] = ()
    prompt: str | None = None


def read_table(path: Path, root: Path) -> list[Row]:
    """The rows of an index CSV.

    Args:
        path: The CSV, UTF-8.
        root: Resolved folder that its paths start from and must stay in.

    Raises:
        DataError: no column `file`, no rows, a path outside the root, boxes that are no JSON, or a file that is no CSV; the row is named.
    """
    rows: list[Row] = []
    with _open(path) as file:
        before = csv.field_size_limit(_FIELD)
        try:
            reader = csv.DictReader(file)
            names = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
            if "file" not in names:
                found = ", ".join(name for name in list(names)[:8] if name) or "none"
                raise DataError(f"images: {path.name} must have a column `file`, got {found}. Its first line must name the columns: file, and perhaps {', '.join(COLUMNS[1:])}.")
            for number, cells in enumerate(reader, 2):
                _check_count(len(rows), path)
                values = {column: (cells.get(names[column]) or "").strip() or None for column in COLUMNS if column in names}
                rows.append(_row(values, f"{path.name}, line {number}", root))
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"images: {path.name} must be a CSV in UTF-8, got something else near row {len(rows) + 2} ({type(error).__name__}). Save it as CSV again.") from error
        finally:
            csv.field_size_limit(before)
    if not rows:
        raise DataError(f"images: {path.name} must have rows, got only the names of the columns. Add one row per image.")
    return rows


def has_file_column(path: Path) -> bool:
    """Whether a file is an index CSV in the schema above."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return "file" in [name.strip().lower() for name in next(csv.reader([file.readline(1 << 16)]), [])]
    except (OSError, UnicodeDecodeError, csv.Error):
        return False


def read_text_list(path: Path, root: Path) -> list[Row]:
    """The lines of a text list: one path per line; empty lines, and those that begin with "# ", are skipped.

    Raises:
        DataError: no lines, or a path outside the root.
    """
    rows: list[Row] = []
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                _check_count(len(rows), path)
                if line.strip() and not line.startswith("# "):
                    rows.append(_row({"file": line.strip()}, f"{path.name}, line {number}", root))
    except UnicodeDecodeError as error:
        raise DataError(f"images: {path.name} must be text in UTF-8, one path per line. Is it an image itself? Then give its folder.") from error
    if not rows:
        raise DataError(f"images: {path.name} must have one path per line, got an empty file.")
    return rows


def _row(values: dict[str, str | None], where: str, root: Path) -> Row:
    file = values.get("file")
    if not file:
        raise DataError(f"images: {where}: file must be a path, got an empty cell. Fill it or remove the row.")
    frame = None
    if "#" in file and not (root / file).exists():
        file, _, frame = file.rpartition("#")
    values = {**values, "file": inside(file, where, root)}
    if values.get("mask"):
        values["mask"] = inside(values["mask"], where, root)
    return Row(**{**values, "frame": frame, "boxes": _boxes(values.get("boxes"), where)})


def inside(text: str, where: str, root: Path) -> str:
    """A relative path in its plain form, after checking that it cannot leave the root.

    Raises:
        DataError: it is absolute, has "..", or is a link that leads outside.
    """
    path = PurePosixPath(text)
    if "\0" in text or path.is_absolute() or PureWindowsPath(text).drive or text.startswith("~"):
        raise DataError(f"images: {where}: paths must be relative, got {text[:80]!r}. Write it relative to the list's folder, or give root.")
    if ".." in path.parts:
        raise DataError(f"images: {where}: paths must stay inside the list's folder, got {text[:80]!r}. Move the list, or give root, a folder that holds all files.")
    check_inside(root / path, root)
    return path.as_posix()


def _boxes(text: str | None, where: str) -> tuple[dict[str, Any], ...]:
    if not text:
        return ()
    try:
        boxes = json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
        raise DataError(f'images: {where}: boxes must be a JSON list such as [{{"label": "nodule", "bbox_xyxy": [10, 20, 30, 40]}}], got something else.') from error
    if not (isinstance(boxes, list) and all(isinstance(box, dict) for box in boxes)):
        raise DataError(f'images: {where}: boxes must be a JSON list such as [{{"label": "nodule", "bbox_xyxy": [10, 20, 30, 40]}}], got another JSON value.')
    return tuple(boxes)


def _check_count(count: int, path: Path) -> None:
    if count >= MAX_FILES:
        raise DataError(f"images: {path.name} must have at most {MAX_FILES:,} rows, got more. Split it.")


def _open(path: Path) -> Any:
    try:
        size = path.stat().st_size
        if size > MAX_LIST_BYTES:
            raise DataError(f"images: {path.name} must have at most {MAX_LIST_BYTES // 2**20} MiB, got {size // 2**20}. Split it.")
        return open(path, newline="", encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"images: {path.name} cannot be read ({error.strerror}). Check the path.") from error
