"""Leaks between splits: a patient in two of them, or near-identical images of different patients."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mwm.data import ReadSettings, UnreadableImage, read_image
from mwm.data.csv_cells import file_cell, text_cell
from mwm.data.records import Record
from mwm.data.signature import NEAR_IDENTICAL, Pair, look_alikes, signature
from mwm.study.errors import StudyError
from mwm.study.index import UNLABELLED, Indexed, index_path, read_index
from mwm.train.checkpoint import write_text


@dataclass(frozen=True)
class Leaks:
    """What two splits share.

    Attributes:
        patients: Number of patients with images in several splits.
        pairs: Near-identical images of different patients in different splits: (file, split, file, split, likeness).
    """

    patients: int
    pairs: tuple[tuple[str, str, str, str, float], ...]

    def __bool__(self) -> bool:
        return bool(self.patients or self.pairs)


def signatures(data: Indexed, root: Path, *, read: ReadSettings | None = None, progress: bool = False) -> NDArray:
    """Signatures of all images of an index; zero (like nothing) for those that cannot be read. float32 [N, 4096]

    Args:
        data: The index.
        root: Folder of its paths.
        read: How the tasks read the images, whose own comparison must find no pair that this one did not; size and aspect are not used.
        progress: Show a bar.
    """
    rows, settings = [], replace(read or ReadSettings(), aspect="stretch", size=(64, 64))
    for row in tqdm(data.rows, desc="comparing images", unit="img", disable=not progress, leave=False):
        try:
            rows.append(signature(read_image(Record(root / row.file, row.file, 0, frame=row.frame), settings, channels=1)))
        except UnreadableImage:
            rows.append(np.zeros(4096, dtype=np.float32))
    return np.stack(rows) if rows else np.zeros((0, 4096), dtype=np.float32)


def alike_patients(data: Indexed, root: Path, *, threshold: float = NEAR_IDENTICAL, read: ReadSettings | None = None,
                   progress: bool = False) -> tuple[list[Pair], dict[str, str]]:
    """Patients that share a near-identical image, and so may not be in different splits.

    Args:
        data: The index.
        root: Folder of its paths.
        threshold: Least likeness of two images.
        read: How the tasks read the images.
        progress: Show a bar.

    Returns:
        The pairs of images (positions in the index), and the common name of each patient that is one of several.
    """
    units = [data.unit(k) for k in range(len(data.rows))]
    pairs = look_alikes(signatures(data, root, read=read, progress=progress), units, threshold=threshold)
    parent = {unit: unit for pair in pairs for unit in (units[pair.first], units[pair.second])}

    def head(unit: str) -> str:
        while parent[unit] != unit:
            unit = parent[unit]
        return unit

    for pair in pairs:
        one, other = sorted((head(units[pair.first]), head(units[pair.second])))
        parent[other] = one
    members: dict[str, list[str]] = {}
    for unit in parent:
        members.setdefault(head(unit), []).append(unit)
    return pairs, {unit: "+".join(sorted(group)) for group in members.values() for unit in group}


def find_leaks(index: str | Path, *, threshold: float = NEAR_IDENTICAL, progress: bool = False) -> Leaks:
    """Compare the splits of an index CSV with each other.

    Neighbouring slices of one patient are alike by nature; so only images of different patients are compared, and a patient
    in two splits is a leak in itself. `unlabelled` rows are training.

    Args:
        index: Index CSV with the columns split and, where known, patient; or its folder.
        threshold: Least likeness of two images.
        progress: Show a bar.
    """
    path = index_path(index)
    data = read_index(path)
    units = [data.unit(k) for k in range(len(data.rows))]
    sides = ["train" if (row.split or "").lower() == UNLABELLED else row.split or "" for row in data.rows]
    where: dict[str, set[str]] = {}
    for row, side in zip(data.rows, sides, strict=True):
        if row.patient:
            where.setdefault(row.patient, set()).add(side)
    pairs = look_alikes(signatures(data, path.parent, progress=progress), units, sides, threshold=threshold)
    return Leaks(sum(len(found) > 1 for found in where.values()),
                 tuple((data.rows[p.first].file, sides[p.first], data.rows[p.second].file, sides[p.second], round(p.likeness, 4)) for p in pairs))


def check_folds(paths: Sequence[str | Path], *, allow_leak: bool = False, threshold: float = NEAR_IDENTICAL, progress: bool = False) -> list[Leaks]:
    """Refuse folds whose splits share patients or near-identical images.

    Args:
        paths: Index CSV of each fold.
        allow_leak: Return what was found instead of refusing it.
        threshold: Least likeness of two images.
        progress: Show a bar.

    Raises:
        StudyError: a fold leaks and `allow_leak` is off; the first leak is named.
    """
    found = []
    for path in paths:
        leaks = find_leaks(path, threshold=threshold, progress=progress)
        found.append(leaks)
        if leaks and not allow_leak:
            if leaks.patients:
                raise StudyError(f"study: a patient must be in one split only, got {leaks.patients} in several in {Path(path).name}. "
                                 "Make the folds again, or pass allow_leak=True.")
            one, side, other, side2, likeness = leaks.pairs[0]
            raise StudyError(f"study: near-identical images must be in one split, got {len(leaks.pairs)} pairs in several in {Path(path).name}: {one} ({side}) and {other} "
                             f"({side2}) are {likeness:.2f} alike. Give their patients one name, or pass allow_leak=True.")
    return found


def write_pairs(path: Path, data: Indexed, pairs: Sequence[Pair]) -> None:
    """leaks.csv: near-identical images of different patients; nothing is written where there are none."""
    if not pairs:
        return
    buffer = io.StringIO()
    named = [(file_cell(row.file), text_cell(row.label)) for row in data.rows]
    rows = [(*named[p.first], *named[p.second], f"{p.likeness:.4f}") for p in pairs]
    csv.writer(buffer, lineterminator="\n").writerows([("first", "first_label", "second", "second_label", "likeness"), *rows])
    write_text(path, buffer.getvalue())
