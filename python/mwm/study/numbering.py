"""Images and patients of a data set as numbers: what a study found can then be shown and carried to another machine without their names.

Both are numbered in the order of their names, so that what depends on that order (a bootstrap's draws) stays as it is; an image whose patient is not known is one of its
own, as everywhere in a study. Whoever has the data set and the folds gets the names back; whoever has not,
sees which images are of one patient and which fold tests them, and no more.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mwm.data.csv_cells import file_cell, text_cell
from mwm.data.table import Row
from mwm.study.errors import StudyError
from mwm.study.index import read_index


@dataclass(frozen=True)
class NumberedFolds:
    """The folds of a data set, numbered.

    Attributes:
        images: name of an image ("file", of volumes "file#frame") -> number.
        tables: fold -> CSV with the columns file, split, label, patient; equal text means equal folds.
    """

    images: dict[str, str]
    tables: dict[int, str]


def image_name(row: Row) -> str:
    """The name of a row's image in predictions: its file, of volumes with the frame."""
    return row.file if row.frame is None else f"{row.file}#{row.frame}"


def number_folds(folder: str | Path) -> NumberedFolds:
    """Number the folds of a data set.

    Args:
        folder: OUT/folds/DATA_SET.

    Raises:
        StudyError: there are no folds.
    """
    folds = {int(path.stem): read_index(path) for path in Path(folder).glob("*.csv") if path.stem.isdigit()}
    if not folds:
        raise StudyError(f"study: folds must be in {folder}, got none. Run the study, or make them with write_folds.")
    images = _numbered({image_name(row) for data in folds.values() for row in data.rows})
    patients = _numbered({data.unit(k) for data in folds.values() for k in range(len(data.rows))})
    tables = {}
    for fold, data in sorted(folds.items()):
        rows = sorted([images[image_name(row)], row.split or "", text_cell(row.label or ""), patients[data.unit(k)]] for k, row in enumerate(data.rows))
        tables[fold] = _csv([["file", "split", "label", "patient"], *rows])
    return NumberedFolds(images, tables)


def rename_csv(text: str, names: Mapping[str, str], *, keep: Callable[[dict[str, str]], bool] = lambda row: True) -> str:
    """Other names in the column `file` of a CSV.

    Args:
        text: CSV, its files written by `file_cell`.
        names: name -> new name.
        keep: which rows stay.

    Raises:
        StudyError: a file that has no new name, or no column `file`.
    """
    reader = csv.DictReader(io.StringIO(text))
    if "file" not in (reader.fieldnames or ()):
        raise StudyError("study: predictions must have a column file, got none. Remove the cell and run it again.")
    cells = {file_cell(name): file_cell(new) for name, new in names.items()}
    rows = [{**row, "file": _renamed(row["file"], cells)} for row in reader if keep(row)]
    return _csv([list(reader.fieldnames), *([row.get(name) or "" for name in reader.fieldnames] for row in rows)])


def rename_coco(text: str, names: Mapping[str, str]) -> str:
    """Other names of the images of a COCO file; what detection does not need (other keys) is left out.

    Args:
        text: JSON with `images`, `annotations` and `categories`.
        names: name -> new name.

    Raises:
        StudyError: an image that has no new name, or no COCO file.
    """
    try:
        content = json.loads(text)
        images = [{**_only(image, ("id", "width", "height")), "file_name": _renamed(image["file_name"], names)} for image in content["images"]]
        notes = [_only(note, ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")) for note in content["annotations"]]
        return json.dumps({"images": images, "annotations": notes, "categories": [_only(kind, ("id", "name")) for kind in content["categories"]]})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, StudyError):
            raise
        raise StudyError(f"study: ground truth must be a COCO file, got something else ({type(error).__name__}). Remove the cell and run it again.") from error


def only_detections(text: str) -> str:
    """COCO results without other keys than detections have.

    Raises:
        StudyError: it is no list of results.
    """
    try:
        return json.dumps([_only(found, ("image_id", "category_id", "bbox", "score", "segmentation")) for found in json.loads(text)])
    except (ValueError, TypeError, AttributeError) as error:
        raise StudyError(f"study: detections must be COCO results, got something else ({type(error).__name__}). Remove the cell and run it again.") from error


def _only(held: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: held[key] for key in keys if key in held}


def _numbered(names: set[str]) -> dict[str, str]:
    """Padded, so that the numbers sort as the names do."""
    return {name: f"{k:07d}" for k, name in enumerate(sorted(names))}


def _renamed(name: str | None, names: Mapping[str, str]) -> str:
    if name not in names:
        raise StudyError(f"study: answers must be of images of the folds, got one of {name!r}. Were the folds made of other data?")
    return names[name]


def _csv(rows: list[list[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
