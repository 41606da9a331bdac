"""Average precision of out-of-fold detections as a function of how often each patient counts.

Scores of the folds' models are not on one scale, so AP is computed in each fold and averaged with the folds' objects as weights. Matching is done
once; a draw only changes how often each image counts. Objects of all sizes; AP by size of single folds is in their metrics.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mwm.study.endpoints import Statistic
from mwm.study.errors import StudyError
from mwm.transfer.coco_metrics import RECALLS, Matches, match

KINDS = {"box": "bbox", "mask": "segm"}
FIGURES = {"ap": slice(None), "ap50": slice(0, 1), "ap75": slice(5, 6)}
"""Thresholds of each figure, of the ten from 0.5 to 0.95."""


@dataclass(frozen=True)
class FoldMatches:
    """Matches of one fold.

    Attributes:
        tables: By kind ("box", "mask"): matches of each class.
        patient: Of each image, in the order of the image ids.
    """

    tables: dict[str, list[Matches]]
    patient: tuple[str, ...]


@dataclass(frozen=True)
class Detections:
    """Out-of-fold detections of one arm, by fold."""

    folds: dict[int, FoldMatches]
    _seen: dict[bytes, NDArray] = field(default_factory=dict, compare=False, repr=False)

    @property
    def patients(self) -> list[str]:
        """Sorted; the order of a draw's counts."""
        return sorted({name for fold in self.folds.values() for name in fold.patient})

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(len(fold.patient) for fold in self.folds.values())

    @property
    def endpoints(self) -> list[str]:
        """box_ap, box_ap50, …, and mask_ap … where there are masks."""
        kinds = set.intersection(*(set(fold.tables) for fold in self.folds.values()))
        return [f"{kind}_{name}" for kind in KINDS if kind in kinds for name in FIGURES]

    def only(self, folds: Sequence[int]) -> Detections:
        """Some of the folds."""
        return self if set(folds) == set(self.folds) else Detections({fold: self.folds[fold] for fold in folds})

    def statistic(self, endpoint: str) -> Statistic:
        """An endpoint as a function of the patients' counts."""
        kind, _, name = endpoint.partition("_")
        return lambda counts: self._average(kind, np.asarray(counts).reshape(-1, len(self.patients)))[:, list(FIGURES).index(name)]

    def _average(self, kind: str, counts: NDArray) -> NDArray:
        """The figures of each draw, kept, because a table asks for one after the other. float64 [R, 3]"""
        key = blake2b(kind.encode() + counts.astype(np.float64).tobytes(), digest_size=16).digest()
        if key in self._seen:
            return self._seen[key]
        place = {patient: k for k, patient in enumerate(self.patients)}
        total, objects = np.zeros((len(counts), len(FIGURES))), np.zeros(len(counts))
        for fold in self.folds.values():
            weights = counts.astype(np.float64)[:, [place[name] for name in fold.patient]]
            held = sum(weights @ matches.objects for matches in fold.tables[kind])
            precision = np.stack([_precision(matches, weights) for matches in fold.tables[kind]])  # [K, R, 10]
            known = np.isfinite(precision)
            for k, thresholds in enumerate(FIGURES.values()):
                number = known[:, :, thresholds].sum((0, 2))  # a class without objects in a draw is left out
                total[:, k] += held * np.where(known, precision, 0)[:, :, thresholds].sum((0, 2)) / np.maximum(number, 1)
            objects += held
        values = np.divide(total, objects[:, None], out=np.full(total.shape, np.nan), where=objects[:, None] > 0)
        self._seen[key] = values
        return values


def _precision(matches: Matches, weights: NDArray) -> NDArray:
    """`average_precision` of many draws at once.

    Recall rises at hits alone, and the highest precision from a place on is that of a hit; so it is enough to look at those.

    Args:
        matches: Of one class.
        weights: How often each image counts in each draw. float64 [R, I]

    Returns:
        float64 [R, 10]; NaN where a draw has no object.
    """
    objects = weights @ matches.objects
    values, each = np.zeros((len(weights), 10)), weights[:, matches.image]
    shown = np.cumsum(each, 1) if matches.counts.all() else None
    for t in range(10):
        hits = np.flatnonzero(matches.hit[t] & matches.counts[t])
        if len(hits):
            found = np.cumsum(each[:, hits], 1)
            precision = found / ((np.cumsum(each * matches.counts[t], 1) if shown is None else shown)[:, hits] + np.spacing(1))
            envelope = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
            passed = np.searchsorted(RECALLS, found / np.where(objects > 0, objects, 1)[:, None], side="right")
            values[:, t] = (envelope * np.diff(passed, axis=1, prepend=0)).sum(1) / len(RECALLS)
    values[objects == 0] = np.nan
    return values


def read_detections(cells: Sequence[tuple[int, Path]], patients: Mapping[int, Mapping[str, str]]) -> Detections:
    """Read and match the detections of an arm.

    Args:
        cells: Fold and results folder (predictions.json, ground_truth.json) of each cell.
        patients: Per fold: file -> patient of the images that it tests.

    Raises:
        StudyError: an image that the fold does not test.
        ImportError: pycocotools is not installed.
    """
    folds = {}
    for fold, folder in cells:
        truth, results = (json.loads((folder / name).read_text()) for name in ("ground_truth.json", "predictions.json"))
        images = sorted(truth["images"], key=lambda image: image["id"])
        strangers = [image["file_name"] for image in images if image["file_name"] not in patients[fold]]
        if strangers:
            raise StudyError(f"collect: test detections must be of the images that fold {fold} tests, got {len(strangers)} others (the first is {strangers[0]!r}). "
                             "Remove the cell and run it again.")
        # A detector that finds nothing in a fold has an AP of 0 there, for masks as for boxes.
        masks = all("segmentation" in result for result in results) and any(note.get("segmentation") for note in truth["annotations"])
        tables = {kind: [by_area[0] for by_area in match(truth, results, coco, areas=("all",))] for kind, coco in KINDS.items() if kind == "box" or masks}
        folds[fold] = FoldMatches(tables, tuple(patients[fold][image["file_name"]] for image in images))
    return Detections(folds)
