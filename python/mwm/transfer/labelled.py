"""Labelled images and their splits: read, checked, and completed by patient where a split is missing."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mwm.data import MaskFolder, ReadSettings, Record, read_list
from mwm.transfer.config import TransferError

SPLITS = ("train", "val", "test")
_SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test", "testing": "test"}


@dataclass(frozen=True)
class Case:
    """One labelled image.

    Attributes:
        record: The image, as the data room read it.
        label: Index into the classes; -1 where the image has none (never for classification).
        patient: Patient, or "" where not known.
        split: train, val, test, or "" before the splits are made.
        mask: File of the mask, inside the folder of the list; None where the image has none.
        boxes: Boxes of the list, dicts with `label` and `bbox_xyxy` (pixels of the stored image), unchecked; None where the list has no such cell.
    """

    record: Record
    label: int
    patient: str
    split: str
    mask: Path | None = None
    boxes: list[dict[str, Any]] | None = None

    @property
    def file(self) -> str:
        """Relative name of the file that holds the image; slices of a volume have one, and are of one patient."""
        return self.record.name if self.record.frame is None else self.record.name.rpartition("#")[0]


@dataclass(frozen=True)
class Labelled:
    """Checked cases.

    Attributes:
        classes: Names, sorted; a label is an index into them.
        cases: All cases, in the order of the list.
        patients_known: Whether every case has a patient.
        notes: What was left out or made, one sentence each.
        need: What the task learns from: label, mask or boxes.
    """

    classes: tuple[str, ...]
    cases: tuple[Case, ...]
    patients_known: bool
    notes: tuple[str, ...]
    need: str = "label"

    def of(self, split: str) -> list[Case]:
        """Cases of one split."""
        return [case for case in self.cases if case.split == split]

    def keep(self, names: Collection[str]) -> Labelled:
        """Only the cases whose images have these names, checked again."""
        cases = [case for case in self.cases if case.record.name in names]
        if len(cases) == len(self.cases):
            return self
        check_splits(cases, self.classes, need=self.need, allow_leak=True)
        note = f"{len(self.cases) - len(cases)} images cannot be read and are left out; skipped.csv lists them."
        return replace(self, cases=tuple(cases), notes=(*self.notes, note))


def read_labelled(data: str | Path, *, need: str = "label", labels: Sequence[str] | None = None, masks: str | Path | None = None, val_share: float = 0.2,
                  test_share: float = 0.25, seed: int = 0, allow_leak: bool = False, settings: ReadSettings | None = None) -> Labelled:
    """Read a folder-per-class tree or an index CSV; no patient ends in two splits.

    Args:
        data: A folder whose sub-folders are the classes, also below train/ val/ test/; or an index CSV with the columns file, label and
            perhaps split, patient, mask, boxes; or a folder that holds such an index.csv.
        need: What the task learns from. "label": images without one are left out, and every split must hold every class. "mask", "boxes":
            any image counts, also one without a class, mask or box; classes only spread over the splits that are made here.
        labels: Labels to keep; None keeps all.
        masks: Folder of masks that are found by the names of the images, where the list has none.
        val_share: Share of the training patients for a val split where there is none.
        test_share: Share of all patients for a test split where there is none.
        seed: Of the splits that are made here.
        allow_leak: Note a patient in two splits instead of refusing it.
        settings: How volumes are cut into slices.

    Raises:
        TransferError: no labels (masks, boxes), one class only, a class that a split lacks or only the test has, or a patient in two splits.
    """
    path = Path(data)
    index = path / "index.csv" if path.is_dir() and (path / "index.csv").is_file() else path
    rows = _from_folders(path, settings) if need == "label" and not index.is_file() else _from_index(index, settings, need, masks)
    notes = []
    if labels is not None:
        absent = sorted(set(labels) - {label for _, label, _ in rows})
        if absent:
            present = {label for _, label, _ in rows if label}
            raise TransferError(f"finetune: labels must occur in DATA, got {', '.join(absent)}{_near(absent[0], present)}. It has {_listed(present)}.")
        rows = [row for row in rows if row[1] in labels]
    unlabelled = sum(1 for _, label, _ in rows if not label) if need == "label" else 0
    foreign = Counter(split for _, label, split in rows if (label or need != "label") and split and split.lower() not in _SPLIT_WORDS)
    rows = [row for row in rows if (row[1] or need != "label") and (not row[2] or row[2].lower() in _SPLIT_WORDS)]
    if unlabelled:
        notes.append(f"{unlabelled} images without a label are left out.")
    for split, count in foreign.items():
        notes.append(f"{count} images of the split {split!r} are left out; known are train, val and test.")
    if not rows:
        raise TransferError("finetune: DATA must hold labelled images, got none. Use one folder per class, or an index CSV with a column `label`.")
    classes = tuple(sorted({label for _, label, _ in rows if label}))
    plain = Counter(name.casefold().replace("_", " ").replace("-", " ") for name in classes)
    twice = [name for name in classes if plain[name.casefold().replace("_", " ").replace("-", " ")] > 1]
    if twice:
        raise TransferError(f"finetune: a label must be written in one way, got {twice[0]!r} and {twice[1]!r}. Make them one.")
    if need == "label" and len(classes) < 2:
        raise TransferError(f"finetune: DATA must hold at least two classes, got only {classes[0]!r}. Add the images of another class.")
    cases = [Case(record, classes.index(label) if label else -1, str(record.patient or ""), _SPLIT_WORDS.get((split or "").lower(), ""), record.mask,
                  list(record.boxes) or None) for record, label, split in rows]
    return complete_splits(cases, classes, need=need, val_share=val_share, test_share=test_share, seed=seed, allow_leak=allow_leak, notes=notes)


def complete_splits(cases: Sequence[Case], classes: Sequence[str], *, need: str = "label", val_share: float = 0.2, test_share: float = 0.25, seed: int = 0,
                    allow_leak: bool = False, notes: Sequence[str] = ()) -> Labelled:
    """Make the splits that are missing, by patient, and check all of them.

    Args:
        cases: With their splits, or "" where there are none yet.
        classes: Names; a label is an index into them.
        need, val_share, test_share, seed, allow_leak: As in `read_labelled`.
        notes: What was noted before.

    Raises:
        TransferError: some images have a split and others none, or the splits do not pass `check_splits`.
    """
    cases, classes, notes = list(cases), tuple(classes), list(notes)
    unsplit = sum(not case.split for case in cases)
    if unsplit and unsplit < len(cases):
        raise TransferError(f"finetune: split must be given for all images or for none, got {unsplit} of {len(cases)} without one. Fill the column.")
    if all(not case.patient for case in cases):
        slices = "; slices of a file stay together" if any(case.record.frame is not None for case in cases) else ""
        notes.append(f"Patients are not known: images are split and counted one by one{slices}, and intervals are too narrow if patients have several.")
    if unsplit:
        cases = _divide(cases, "", "test", "train", test_share, seed, classes, need)
    if not any(case.split == "test" for case in cases):
        cases = _divide(cases, "train", "test", "train", test_share, seed, classes, need)
        notes.append(f"DATA has no test split: {test_share:.0%} of the training patients of each class were put aside (seed {seed}).")
    if not any(case.split == "val" for case in cases):
        cases = _divide(cases, "train", "val", "train", val_share, seed + 1, classes, need)
        notes.append(f"DATA has no val split: {val_share:.0%} of the training patients of each class were put aside (seed {seed}).")
    notes += check_splits(cases, classes, need=need, allow_leak=allow_leak)
    return Labelled(classes, tuple(cases), all(case.patient for case in cases), tuple(notes), need)


def _from_index(path: Path, settings: ReadSettings | None, need: str, masks: str | Path | None = None) -> list[tuple[Record, str, str]]:
    records = list(read_list(path, settings=settings))
    if masks is not None:
        folder = MaskFolder(masks)
        records = [replace(record, mask=record.mask or folder.find(record)) for record in records]
    if need != "label" and not any(getattr(record, need) for record in records):
        wanted = "paths of masks" if need == "mask" else "JSON lists of boxes"
        raise TransferError(f"finetune: {path.name} must have a column `{need}` with {wanted}, got none. Give an index CSV that has it.")
    if need == "label" and not any(record.label for record in records):
        raise TransferError(f"finetune: {path.name} must have a column `label` with values, got none. Add it, or give a folder per class.")
    return [(record, str(record.label or "").strip(), str(record.split or "").strip()) for record in records]


def _from_folders(path: Path, settings: ReadSettings | None) -> list[tuple[Record, str, str]]:
    """Class and split from the path below DATA: CLASS/… or SPLIT/CLASS/…"""
    rows, seen = [], set()
    for record in read_list(path, settings=settings):
        parts = Path(record.name).parts
        split = parts[0] if len(parts) > 2 and parts[0].lower() in _SPLIT_WORDS else ""
        inside = parts[1:] if split else parts
        if len(inside) < 2:
            raise TransferError(f"finetune: every image of DATA must lie in the folder of its class, got {record.name} beside them. Move it, or give an index CSV.")
        rows.append((record, inside[0], split))
        seen.add((split, inside[0]))
    for split in sorted({split for split, _ in seen}):
        for folder in sorted(p for p in (path / split).iterdir() if p.is_dir() and not p.name.startswith(".")):
            if (split, folder.name) not in seen and folder.name.lower() not in _SPLIT_WORDS:
                raise TransferError(f"finetune: every class folder must hold images, got none in {folder.relative_to(path)}. Fill it or remove it.")
    return rows


def _divide(cases: list[Case], source: str, aside: str, rest: str, share: float, seed: int, classes: Sequence[str], need: str) -> list[Case]:
    """Put a share of each class's patients of one split aside; a patient with images of several classes counts to the one that fewest patients have."""
    own: dict[str, set[int]] = {}
    for case in cases:
        if case.split == source:
            own.setdefault(_unit(case), set()).add(case.label)
    held = Counter(label for labels in own.values() for label in labels)
    home = {unit: min(labels, key=lambda label: (label < 0, held[label], label)) for unit, labels in own.items()}
    generator = np.random.default_rng(seed)
    taken: set[str] = set()
    for label in [*range(len(classes)), *([-1] if -1 in home.values() else [])]:
        units = sorted(unit for unit, of in home.items() if of == label)
        if need == "label" and not held[label]:
            raise TransferError(f"finetune: class {classes[label]!r} must have training images, got none{_near(classes[label], classes)} (a typing error in the test "
                                "labels?). Add some, or leave the class out with --labels.")
        if need == "label" and held[label] < 2:
            raise TransferError(f"finetune: class {classes[label]!r} must have at least two patients to put some aside for {aside}, got {held[label]}"
                                f"{_near(classes[label], classes)}. Give splits in an index CSV, or add patients.")
        if len(units) < 2:  # its other patients count to rarer classes, and some of those are put aside
            continue
        count = min(len(units) - 1, max(1, round(share * len(units))))
        taken.update(units[k] for k in generator.permutation(len(units))[:count])
    if not taken:
        raise TransferError(f"finetune: some label must have at least two patients to put some aside for {aside}, got {len(own)} patients in all. Give splits in an index CSV, "
                            "or add patients.")
    return [replace(case, split=aside if _unit(case) in taken else rest) if case.split == source else case for case in cases]


def _unit(case: Case) -> str:
    return case.patient or f"image {case.record.id if case.record.frame is None else ''} {case.file}"


def check_splits(cases: Sequence[Case], classes: Sequence[str], *, need: str = "label", allow_leak: bool = False) -> list[str]:
    """Refuse splits that share a patient, or that lack a class, or that hold a class unknown to training.

    Args:
        cases: With their splits.
        classes: Names.
        need: As in `read_labelled`; without labels to learn, a split may lack a class but not be empty.
        allow_leak: Note shared patients instead of refusing them.

    Returns:
        Notes, one sentence each.

    Raises:
        TransferError: with what is wrong and what to do.
    """
    where: dict[str, set[str]] = {}
    for case in cases:
        if case.patient:
            where.setdefault(case.patient, set()).add(case.split)
    mixed = [splits for splits in where.values() if len(splits) > 1]
    notes = []
    if mixed:
        pair = " and ".join(sorted(mixed[0], key=SPLITS.index))
        if not allow_leak:
            raise TransferError(f"finetune: a patient must be in one split only, got {len(mixed)} patients in several (the first in {pair}). Correct the index, "
                                "or add --allow-leak.")
        notes.append(f"LEAK allowed: {len(mixed)} patients are in several splits; figures of the test are too good.")
    if need != "label":
        for split in SPLITS:
            if not any(case.split == split for case in cases):
                raise TransferError(f"finetune: DATA must have images in {split}, got none. Name the splits train, val and test, or leave the column out.")
        return notes
    present = {split: {case.label for case in cases if case.split == split} for split in SPLITS}
    if not present["train"]:
        raise TransferError("finetune: DATA must have a train split, got none. Name it `train`.")
    for split in ("val", "test"):
        unseen = sorted(classes[k] for k in present[split] - present["train"])
        if unseen:
            known = [classes[k] for k in sorted(present["train"])]
            raise TransferError(f"finetune: labels of {split} must occur in train, got {unseen[0]!r}, which does not{_near(unseen[0], known)}. Train has {_listed(known)}.")
    for split in ("test", "val"):
        lacking = sorted(classes[k] for k in present["train"] - present[split])
        if lacking:
            raise TransferError(f"finetune: every class must have images in {split}, got none of {_listed(lacking)}{_near(lacking[0], classes)}. Add some, or choose "
                                "classes with --labels.")
    return notes


def lone_patients(data: Labelled) -> list[str]:
    """Notes on the splits that hold one patient only, whose figures have no interval."""
    if not data.patients_known:
        return []
    words = {"train": "train holds one patient only.", "val": "val holds one patient only: its figures say nothing about others.",
             "test": "test holds one patient only: its figures say nothing about others."}
    return [words[split] for split in SPLITS if len({case.patient for case in data.of(split)}) == 1]


def _near(name: str, others: Collection[str]) -> str:
    """The other name that this one is probably a typing error of, in brackets."""
    near = difflib.get_close_matches(name, [other for other in others if other != name], 1, 0.75)
    return f" (is it {near[0]!r}?)" if near else ""


def _listed(names: Sequence[str] | set[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:8]) + (f" and {len(ordered) - 8} more" if len(ordered) > 8 else "")
