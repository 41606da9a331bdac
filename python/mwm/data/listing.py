"""`read_list`: folder, glob, text list or index CSV, all with the same records as a result."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import readers
from .errors import DataError
from .limits import MAX_FILES
from .records import ImageList, Record, assign_ids
from .settings import ReadSettings
from .table import Row, has_file_column, read_table, read_text_list
from .walk import expand_glob, has_wildcard, walk


def read_list(images: str | Path | Sequence[Record], *, split: str | None = None, root: str | Path | None = None, settings: ReadSettings | None = None) -> ImageList:
    """List the images that IMAGES names.

    * A folder: all PNG, JPEG, TIFF, DICOM and NIfTI files below it; hidden ones are left out. A folder that holds an
      `index.csv` with a column `file` is read by it.
    * A glob: `*`, `?`, `[…]`, and `**` for any number of folders. Quote it in a shell.
    * A text list (any other extension than .csv): one path per line.
    * An index CSV: the schema is in `mwm.data.table`.

    Volumes, stacks and multi-frame files become one record per slice or frame. Files are not decoded: one that turns out
    unreadable is left out, counted and listed later. Names, and so ids, masks and crops, depend on the path relative to IMAGES
    (the folder, the glob's part before the first wildcard, the folder of the list, or `root`), not on where that is.

    Args:
        images: What the user typed; a single image file, such as one volume, is a list too. Records are taken as they are.
        split: Keep only rows of this split of an index CSV.
        root: For lists and CSVs: folder that paths start from and must stay in, instead of the list's own. For a
            folder: folder that links may lead into.
        settings: Slice axis and orientation of volumes; the defaults where left out.

    Returns:
        The records: folders and globs in the order of their paths, lists in their own.

    Raises:
        DataError: nothing there, no images, a missing column, a path outside the root, a loop of links, a file listed
            twice, or absurdly many files; one sentence.
    """
    settings = settings or ReadSettings()
    if not isinstance(images, (str, Path)):
        return ImageList(_of_split(list(images), split), Path(root or "."))
    text = str(images)
    path = Path(text).expanduser()
    if not text.strip() or "\0" in text:
        raise DataError("images: IMAGES must be a folder, glob, text list or index CSV, got an empty text.")
    if path.is_dir():
        index = path / "index.csv"
        if index.is_file() and has_file_column(index):
            rows, base = read_table(index, _root(root, path)), _root(root, path)
        else:
            rows, base = _from_files(walk(path, _root(root, path)), path), path
            if not rows:
                raise DataError(f"images: {_shown(path)} must hold PNG, JPEG, TIFF, DICOM or NIfTI files, got none. Check the path.")
    elif path.is_file():
        base = _root(root, path.parent)
        if readers.is_image_name(path):
            rows = [Row(path.name)]
            base = path.parent
        else:
            rows = read_table(path, base) if path.suffix.lower() == ".csv" else read_text_list(path, base)
    elif has_wildcard(text):
        base, found = expand_glob(text)
        rows = _from_files(found, base)
        if not rows:
            raise DataError(f"images: the glob {text!r} matches no PNG, JPEG, TIFF, DICOM or NIfTI file. Check it, and quote it in the shell.")
    else:
        raise DataError(f"images: there is no {text!r}. Check the path.{_similar(path)}")
    records = _records(rows, base, settings)
    return ImageList(_of_split(records, split), base)


def _from_files(paths: Iterable[Path], base: Path) -> list[Row]:
    return [Row(path.relative_to(base).as_posix()) for path in paths if readers.is_image_name(path)]


def _records(rows: list[Row], base: Path, settings: ReadSettings) -> list[Record]:
    """One record per slice of each row; refuses files that are listed twice, and lists whose files are all missing."""
    records: list[Record] = []
    names: set[str] = set()
    files: dict[tuple[int, int], Path] = {}
    for row in rows:
        path = base / row.file
        exists = _is_new_file(path, files, base)
        split = [row.frame] if row.frame is not None else (readers.frames(path, settings) if exists else []) or [None]
        if len(records) + len(split) > MAX_FILES:
            raise DataError(f"images: a list must have at most {MAX_FILES:,} images, slices counted, got more. Split it.")
        for frame in split:
            name = row.file if frame is None else f"{row.file}#{frame}"
            if name in names:
                raise DataError(f"images: each image must be listed once, got {name!r} twice. Remove one of the two.")
            names.add(name)
            records.append(Record(path, name, 0, row.split, row.label, row.patient, base / row.mask if row.mask else None, row.boxes, row.prompt, frame))
    if not files:
        raise DataError(f"images: none of the {len(rows)} listed files is there (the first is {rows[0].file!r}). Paths are relative to {_shown(base)}; "
                        "give root where they start elsewhere.")
    return assign_ids(records)


def _is_new_file(path: Path, files: dict[tuple[int, int], Path], base: Path) -> bool:
    """Whether a file is there; refuses a second name for one file through links, which could put it into two splits."""
    try:
        status = path.stat()
    except OSError:
        return False
    first = files.setdefault((status.st_dev, status.st_ino), path)
    if first != path and first.resolve() == path.resolve():
        one, other = (found.relative_to(base).as_posix() for found in (first, path))
        raise DataError(f"images: each image must be listed once, but {one!r} and {other!r} are the same file. Remove one of the two.")
    return True


def _of_split(records: list[Record], split: str | None) -> list[Record]:
    if split is None:
        return records
    kept = [record for record in records if record.split == split]
    if not kept:
        present = sorted({record.split for record in records if record.split})
        hint = f"it has {', '.join(present[:6])}" if present else "the list has no column `split`"
        raise DataError(f"images: split {split!r} must have images, got none; {hint}.")
    return kept


def _root(root: str | Path | None, default: Path) -> Path:
    folder = default if root is None else Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"images: root must be a folder, got {_shown(folder)}. Check the path.")
    return folder.resolve()


def _similar(path: Path) -> str:
    try:
        near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], 1, 0.7)
    except OSError:
        return ""
    return f" Did you mean {near[0]!r}?" if near else ""


def _shown(path: Path) -> str:
    return repr(str(path)) if len(str(path)) < 120 else repr("…" + str(path)[-110:])


