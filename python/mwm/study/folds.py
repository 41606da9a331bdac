"""Folds by patient: one index CSV per fold, beside copies of the images, so that every command reads it as it reads any index.

`write_folds` makes, in OUT/folds/DATA_SET/:

| file | holds |
|------|-------|
| 0.csv, 1.csv, …  | the rows of the source index with `split` set to train, val or test (or `unlabelled`); all other columns as they were |
| 0.pretrain.csv … | the train rows and the unlabelled rows of that fold, all with split `train`: what pre-training, pixel statistics and localizers may see |
| images/ …        | copies of the images and masks under their own relative names, so that names, ids, masks and crops are those of the source |
| leaks.csv        | near-identical images of different patients, if there are any; these patients are kept together |
| folds.json       | settings, and images and patients per fold, part and class |
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mwm.data import DataError, ReadSettings
from mwm.data.table import Row
from mwm.study.errors import StudyError
from mwm.study.index import UNLABELLED, Indexed, index_path, merge_patients, read_index
from mwm.study.leaks import alike_patients, write_pairs
from mwm.study.partition import partition
from mwm.train.checkpoint import write_text

PARTS = ("train", "val", "test")
_FEW = 5  # patients of a class below which a data set is only described


@dataclass(frozen=True)
class Folds:
    """The folds of one data set.

    Attributes:
        name: Of the data set.
        paths: CSV of each fold.
        pretrain: CSV of each fold's pre-training images.
        classes: Sorted.
        counts: Per fold: part -> class -> {"images", "patients"}, and part `unlabelled` -> {"images", "patients"}.
        patients: Patients of each class, all folds.
        patients_known: Whether every row names its patient; where not, an image is its own patient.
        merged: Patients that share a near-identical image with another and are therefore counted as one with it.
        descriptive: Whether a class has fewer than five patients: then nothing can be inferred, only described.
        seed: Of the folds.
    """

    name: str
    paths: tuple[Path, ...]
    pretrain: tuple[Path, ...]
    classes: tuple[str, ...]
    counts: tuple[dict, ...]
    patients: dict[str, int]
    patients_known: bool
    merged: int
    descriptive: bool
    seed: int


def assign(data: Indexed, *, folds: int | str = 5, seed: int = 0, val_share: float = 0.2) -> tuple[list[list[str]], bool]:
    """The split of every row in every fold; whatever split the index gives is not looked at, except `unlabelled`.

    Every patient with labels is tested in exactly one fold. Of the other patients about `val_share` (of the images of each
    class) are the inner validation split. Rows without a label, or whose split is `unlabelled`, become `unlabelled`, except
    in folds where their patient is in val or test: there they get "" and are left out.

    Args:
        data: From `read_index`.
        folds: Number of folds, at least 3; "fit" takes 5, or as many as the rarest class has patients where those are fewer.
        seed: Of the folds.
        val_share: Of the inner validation split.

    Returns:
        Splits [folds][rows], and whether the data set is only to be described (a class with fewer than five patients).

    Raises:
        StudyError: fewer than two classes, a class with too few patients, a label in two spellings, or an image that is listed twice.
    """
    table = _tally(data, folds)
    units, counts, number = table.units, table.counts, table.folds
    position = {unit: p for p, unit in enumerate(units)}
    tested = partition(counts, (1 / number,) * number, seed=seed)
    splits = []
    for fold in range(number):
        part = np.array(["train"] * len(units), dtype=object)
        part[tested == fold] = "test"
        rest = np.flatnonzero(tested != fold)
        inner = partition(counts[rest], (val_share, 1 - val_share), seed=[seed, fold])
        part[rest[inner == 0]] = "val"
        for name in PARTS:
            lacking = [table.classes[c] for c in np.flatnonzero(counts[part == name].sum(0) == 0)]
            if lacking:
                raise StudyError(f"study: every class must have patients in {name} of every fold, got none of {lacking[0]!r} in fold {fold}. "
                                 "Take fewer folds, or leave the class out with labels.")
        column = [""] * len(data.rows)
        for k in table.rows:
            column[k] = part[position[data.unit(k)]]
        for k in set(range(len(data.rows))) - set(table.rows):
            where = position.get(data.unit(k))
            column[k] = UNLABELLED if where is None or part[where] == "train" else ""
        splits.append(column)
    return splits, bool((counts > 0).sum(0).min() < _FEW)


@dataclass(frozen=True)
class _Tally:
    """Labelled rows, classes, patients, images [P, K] and the number of folds."""

    rows: list[int]
    classes: list[str]
    units: list[str]
    counts: NDArray
    folds: int


def _tally(data: Indexed, folds: int | str) -> _Tally:
    labelled = [k for k, row in enumerate(data.rows) if row.label and (row.split or "").lower() != UNLABELLED]
    classes = sorted({data.rows[k].label for k in labelled})
    # What read_list and the tasks refuse would end every cell, some of them after their pre-training.
    named = Counter((row.file, row.frame) for row in data.rows)
    twice = next((file for (file, _), count in named.items() if count > 1), None)
    if twice is not None:
        raise StudyError(f"study: each image must be listed once, got {twice!r} {max(n for (f, _), n in named.items() if f == twice)} times. Remove all rows of it but one.")
    spelt: dict[str, list[str]] = {}
    for name in classes:
        spelt.setdefault(name.casefold().replace("_", " ").replace("-", " "), []).append(name)
    for names in spelt.values():
        if len(names) > 1:
            raise StudyError(f"study: a label must be written in one way, got {' and '.join(map(repr, names))}. Make them one.")
    if len(classes) < 2:
        raise StudyError(f"study: data must hold at least two classes, got {', '.join(map(str, classes)) or 'no labels'}. Add the images of another class.")
    units = sorted({data.unit(k) for k in labelled})
    position = {unit: p for p, unit in enumerate(units)}
    counts = np.zeros((len(units), len(classes)), dtype=np.int64)
    for k in labelled:
        counts[position[data.unit(k)], classes.index(data.rows[k].label)] += 1
    owners = (counts > 0).sum(0)
    rarest = int(np.argmin(owners))
    number = min(_FEW, int(owners[rarest])) if folds == "fit" else folds
    if not isinstance(number, int) or number < 3 or owners[rarest] < number:
        near = difflib.get_close_matches(classes[rarest], [c for c in classes if c != classes[rarest]], 1, 0.8)
        raise StudyError(f"study: folds must be a number from 3 to the patients of the rarest class, or fit, got {folds!r} with {owners[rarest]} patients of "
                         f"{classes[rarest]!r}{f' (is that a typing error for {near[0]!r}?)' if near else ''}. Take fewer folds, or leave the class out with labels.")
    return _Tally(labelled, classes, units, counts, number)


def write_folds(index_csv: str | Path, out: str | Path, *, name: str | None = None, folds: int | str = 5, seed: int = 0, labels: Sequence[str] | None = None,
                subset: str | None = None, val_share: float = 0.2, merge_alike: bool = True, read: ReadSettings | None = None, progress: bool = False) -> Folds:
    """Make the folds of a data set below `out`/folds/; a second call with the same settings changes nothing.

    Patients that share a near-identical image (one scan under two names, or in two classes) are made one patient first: the
    column `patient` of the folds then names both, and leaks.csv lists the images.

    Args:
        index_csv: Index CSV of the data set, or its folder. Only read.
        out: Folder of the study.
        name: Of the data set; by default the name of its folder.
        folds, seed, val_share: As in `assign`.
        labels, subset: As in `read_index`.
        merge_alike: Whether to look for near-identical images.
        read: How the tasks read the images, for that look; size and aspect are not used.
        progress: Show a bar.

    Raises:
        StudyError: as `assign` and `read_index`; other folds than now are already there; or an image is missing.
        DataError: it is no index CSV.
    """
    path = index_path(index_csv)
    data = read_index(path, labels=labels, subset=subset)
    _tally(data, folds)  # refuses before anything is copied or compared
    name = name or path.resolve().parent.name
    folder = Path(out) / "folds" / name
    _copy(data.rows, path.parent, folder)
    pairs, clusters = alike_patients(data, path.parent, read=read, progress=progress) if merge_alike else ([], {})
    data = merge_patients(data, clusters)
    splits, descriptive = assign(data, folds=folds, seed=seed, val_share=val_share)
    write_pairs(folder / "leaks.csv", data, pairs)
    paths, pretrain, counts = [], [], []
    for fold, column in enumerate(splits):
        rows = [(cells, split) for cells, split in zip(data.cells, column, strict=True) if split]
        paths.append(_write_once(folder / f"{fold}.csv", _text(data.columns, rows)))
        seen = [(cells, "train") for cells, split in rows if split in ("train", UNLABELLED)]
        pretrain.append(_write_once(folder / f"{fold}.pretrain.csv", _text(data.columns, seen)))
        counts.append(_count(data, column))
    classes = tuple(sorted({row.label for row, split in zip(data.rows, splits[0], strict=True) if split in PARTS}))
    patients = {c: len({data.unit(k) for k, row in enumerate(data.rows) if row.label == c and splits[0][k] in PARTS}) for c in classes}
    known = all(row.patient for row, split in zip(data.rows, splits[0], strict=True) if split in PARTS)
    result = Folds(name, tuple(paths), tuple(pretrain), classes, tuple(counts), patients, known, len(clusters), descriptive, seed)
    facts = {**asdict(result), "paths": [p.name for p in paths], "pretrain": [p.name for p in pretrain], "labels": labels and list(labels), "subset": subset}
    write_text(folder / "folds.json", json.dumps(facts, indent=1) + "\n")
    return result


def _text(columns: Sequence[str], rows: Sequence[tuple[dict[str, str], str]]) -> str:
    named = {column.strip().lower(): column for column in columns}
    split = named.get("split", "split")
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*columns, *([split] if split not in columns else [])], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**cells, split: value} for cells, value in rows)
    return buffer.getvalue()


def _write_once(path: Path, text: str) -> Path:
    """Write a file, or find it as it would be written; folds that change under a study would mix training and test."""
    if not path.exists():
        write_text(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise StudyError(f"study: folds must stay as they were when the study began, but {path} differs from what the data and settings give now. "
                         "Restore them, or choose another out.")
    return path


def _count(data: Indexed, column: Sequence[str]) -> dict:
    result: dict = {}
    for part in PARTS:
        held = [k for k, split in enumerate(column) if split == part]
        result[part] = {}
        for label in sorted({data.rows[k].label or "" for k in held}):
            of_class = [k for k in held if data.rows[k].label == label]
            result[part][label] = {"images": len(of_class), "patients": len({data.unit(k) for k in of_class})}
    free = [k for k, split in enumerate(column) if split == UNLABELLED]
    return result | {UNLABELLED: {"images": len(free), "patients": len({data.unit(k) for k in free})}}


def _copy(rows: Sequence[Row], source: Path, folder: Path) -> None:
    """Put images and masks beside the CSVs; paths were checked when the index was read."""
    for name in sorted({name for row in rows for name in (row.file, row.mask) if name}):
        target, original = folder / name, source / name
        if not original.is_file():
            raise DataError(f"images: every file of the index must be there, got none at {name!r}. Correct the index.")
        if target.is_file() and target.stat().st_size == original.stat().st_size:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.part")
        shutil.copyfile(original, temporary)
        temporary.replace(target)
