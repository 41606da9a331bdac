"""An index CSV with all of its columns, and patients that must stay together."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mwm.data.table import Row, read_table
from mwm.study.errors import StudyError

UNLABELLED = "unlabelled"


@dataclass(frozen=True)
class Indexed:
    """An index CSV with all of its columns: what mwm reads of a row, and the raw cells."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    cells: tuple[dict[str, str], ...]

    def unit(self, k: int) -> str:
        """Patient of row k; the image itself where the patient is not known."""
        return self.rows[k].patient or f"image {self.rows[k].file}#{self.rows[k].frame or ''}"


def read_index(index: str | Path, *, labels: Sequence[str] | None = None, subset: str | None = None) -> Indexed:
    """Read an index CSV and keep some of its rows.

    Args:
        index: The CSV, or a folder that holds an index.csv.
        labels: Classes to keep; rows of other classes are left out, rows without a label stay.
        subset: Value of the column `subset` to keep.

    Raises:
        StudyError: a label or subset does not occur, or there are no rows.
        DataError: it is no index CSV, or a path leaves its folder.
    """
    path = index_path(index)
    rows = read_table(path, path.parent.resolve())
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = tuple(reader.fieldnames or ())
        cells = [{name: cells.get(name) or "" for name in columns} for cells in reader]
    pairs = list(zip(rows, cells, strict=True))
    if subset is not None:
        present = sorted({c.get("subset", "") for c in cells} - {""})
        _must_occur("subset", subset, present)
        pairs = [(row, c) for row, c in pairs if c.get("subset", "") == subset]
    if labels is not None:
        present = sorted({row.label for row, _ in pairs if row.label})
        for label in labels:
            _must_occur("labels", label, present)
        pairs = [(row, c) for row, c in pairs if row.label is None or row.label in labels]
    return Indexed(columns, tuple(row for row, _ in pairs), tuple(c for _, c in pairs))


def index_path(index: str | Path) -> Path:
    """The CSV, or the index.csv of a folder.

    Raises:
        StudyError: it is not there.
    """
    path = Path(index)
    path = path / "index.csv" if path.is_dir() else path
    if not path.is_file():
        raise StudyError(f"study: data must be an index CSV or a folder with index.csv, got {path}, which is not there. Check the path.")
    return path


def merge_patients(data: Indexed, clusters: Mapping[str, str]) -> Indexed:
    """Give patients a common name.

    Args:
        data: The index.
        clusters: New name by old one (`Indexed.unit`); others keep theirs.
    """
    if not clusters:
        return data
    column = next((name for name in data.columns if name.strip().lower() == "patient"), "patient")
    columns = data.columns if column in data.columns else (*data.columns, column)
    names = [clusters.get(data.unit(k), row.patient) for k, row in enumerate(data.rows)]
    rows = tuple(replace(row, patient=name) for row, name in zip(data.rows, names, strict=True))
    return Indexed(columns, rows, tuple({**cells, column: name or ""} for cells, name in zip(data.cells, names, strict=True)))


def _must_occur(field: str, value: str, present: Sequence[str]) -> None:
    if value not in present:
        near = difflib.get_close_matches(value, present, 1, 0.6)
        raise StudyError(f"study: {field} must occur in the index, got {value!r}{f'; is it {near[0]!r}?' if near else '.'} It has {', '.join(present[:8]) or 'none'}.")
