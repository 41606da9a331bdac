"""Endpoints of pooled out-of-fold answers, as functions of how often each patient counts.

Every patient is tested once, by the model of the fold that held it out. Scores of different models are not on one scale, so whatever ranks (AUROC, AP)
is computed between images of one fold only:

* `auroc`: of all pairs (one image of the class, one of another) within a fold, over all folds, the share that is ordered rightly, ties counting half; for
  more than two classes the mean over classes. That is the mean of the folds' AUROCs weighted by their pairs; a fold that lacks a class in a bootstrap draw
  has no pairs and no say, where a plain mean over folds would not be defined. Pooling the raw scores would instead compare scores of different models, and
  two arms could differ by calibration alone.
* `accuracy`, `balanced_accuracy`, `macro_f1`: from all answers together: whether an answer is right does not depend on a scale.
* `mean` (Dice, IoU, …): over all images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Statistic = Callable[[NDArray], NDArray]
"""How often each patient counts, float [R, P] -> the endpoint of each draw, float [R]; NaN where it is not defined."""


@dataclass(frozen=True)
class Answers:
    """Out-of-fold answers of one arm on one data set and task.

    Attributes:
        file: Image of each row, unique. N
        fold: Of each row. int [N]
        patient: Of each row. N
        truth: Class of each row; empty for tasks without classes. int [N]
        scores: Probabilities [N, K], or one value per image [N] (Dice, …).
    """

    file: tuple[str, ...]
    fold: NDArray
    patient: tuple[str, ...]
    truth: NDArray
    scores: NDArray

    def __post_init__(self) -> None:
        count = len(self.file)
        if len(set(self.file)) != count or any(len(part) != count for part in (self.fold, self.patient, self.scores)) or len(self.truth) not in (0, count):
            raise ValueError(f"Answers: rows must be unique images with fold, patient and scores, got {count} files ({len(set(self.file))} different), "
                             f"{len(self.fold)} folds, {len(self.patient)} patients, {len(self.scores)} scores.")

    def take(self, rows: Sequence[int] | NDArray) -> Answers:
        """Some of the rows."""
        rows = np.asarray(rows, dtype=np.int64)
        return Answers(tuple(self.file[k] for k in rows), self.fold[rows], tuple(self.patient[k] for k in rows), self.truth[rows] if len(self.truth) else self.truth,
                       self.scores[rows])

    @property
    def patients(self) -> list[str]:
        """Sorted; the order of a draw's counts."""
        return sorted(set(self.patient))

    def owners(self) -> NDArray:
        """Index of each row's patient in `patients`. int64 [N]"""
        place = {name: k for k, name in enumerate(self.patients)}
        return np.array([place[name] for name in self.patient], dtype=np.int64)


def statistic(answers: Answers, endpoint: str) -> Statistic:
    """An endpoint as a function of the patients' counts.

    Args:
        answers: Of one arm.
        endpoint: A name of `ENDPOINTS`; every other name is the mean of one value per image.

    Raises:
        ValueError: a classification endpoint without classes, or a mean of probabilities.
    """
    classes = endpoint in ENDPOINTS
    if classes != (answers.scores.ndim == 2) or (classes and len(answers.truth) != len(answers.file)):
        raise ValueError(f"statistic: {endpoint} must be given {'probabilities [N, K] and classes' if classes else 'one value per image'}, got scores "
                         f"{list(answers.scores.shape)} and {len(answers.truth)} classes.")
    return ENDPOINTS[endpoint](answers) if classes else _mean(answers)


def _auroc(answers: Answers) -> Statistic:
    patients, owner = len(answers.patients), answers.owners()
    kinds = [1] if answers.scores.shape[1] == 2 else range(answers.scores.shape[1])
    tables = []  # per class: per fold (patients, wins between them, pairs between them)
    for kind in kinds:
        parts = []
        for fold in np.unique(answers.fold):
            rows = np.flatnonzero(answers.fold == fold)
            positive = rows[answers.truth[rows] == kind]
            negative = rows[answers.truth[rows] != kind]
            if not len(positive) or not len(negative):
                continue
            ours, theirs = np.unique(owner[positive]), np.unique(owner[negative])
            better = np.sign(answers.scores[positive, kind][:, None] - answers.scores[negative, kind][None]) / 2 + 0.5
            left = (ours[:, None] == owner[positive][None]).astype(np.float64)
            right = (theirs[:, None] == owner[negative][None]).astype(np.float64)
            parts.append((ours, theirs, left @ better @ right.T, np.outer(left.sum(1), right.sum(1))))
        tables.append(parts)

    def of(counts: NDArray) -> NDArray:
        counts = np.asarray(counts, dtype=np.float64).reshape(-1, patients)
        values = []
        for parts in tables:
            wins, pairs = np.zeros(len(counts)), np.zeros(len(counts))
            for ours, theirs, better, number in parts:
                wins += ((counts[:, ours] @ better) * counts[:, theirs]).sum(1)
                pairs += ((counts[:, ours] @ number) * counts[:, theirs]).sum(1)
            values.append(np.divide(wins, pairs, out=np.full(len(counts), np.nan), where=pairs > 0))
        stacked = np.stack(values)
        # A class without pairs in a draw is left out, as the metrics of a single run leave out classes that do not occur.
        known = np.isfinite(stacked)
        return np.divide(np.where(known, stacked, 0).sum(0), known.sum(0), out=np.full(stacked.shape[1], np.nan), where=known.any(0))

    return of


def _confusion(answers: Answers) -> NDArray:
    """Answers of each patient by (class, answer). float64 [P, K, K]"""
    classes = answers.scores.shape[1]
    table = np.zeros((len(answers.patients), classes, classes))
    np.add.at(table, (answers.owners(), answers.truth, answers.scores.argmax(1)), 1)
    return table


def _from_confusion(answers: Answers, figure: Callable[[NDArray], NDArray]) -> Statistic:
    table = _confusion(answers)
    patients, classes = table.shape[:2]
    flat = table.reshape(patients, -1)
    return lambda counts: figure((np.asarray(counts, dtype=np.float64).reshape(-1, patients) @ flat).reshape(-1, classes, classes))


def _accuracy(table: NDArray) -> NDArray:
    return np.trace(table, axis1=1, axis2=2) / table.sum((1, 2))


def _balanced(table: NDArray) -> NDArray:
    held = table.sum(2)
    found = np.divide(np.diagonal(table, axis1=1, axis2=2), held, out=np.zeros_like(held), where=held > 0)
    return found.sum(1) / (held > 0).sum(1)


def _macro_f1(table: NDArray) -> NDArray:
    named = table.sum(1) + table.sum(2)
    score = np.divide(2 * np.diagonal(table, axis1=1, axis2=2), named, out=np.zeros_like(named), where=named > 0)
    return score.sum(1) / (named > 0).sum(1)


def _mean(answers: Answers) -> Statistic:
    owner, patients = answers.owners(), len(answers.patients)
    known = np.isfinite(answers.scores)
    total = np.bincount(owner[known], answers.scores[known], patients)
    number = np.bincount(owner[known], minlength=patients).astype(np.float64)

    def of(counts: NDArray) -> NDArray:
        counts = np.asarray(counts, dtype=np.float64).reshape(-1, patients)
        images = counts @ number
        return np.divide(counts @ total, images, out=np.full(len(counts), np.nan), where=images > 0)

    return of


ENDPOINTS: dict[str, Callable[[Answers], Statistic]] = {
    "auroc": _auroc,
    "accuracy": lambda answers: _from_confusion(answers, _accuracy),
    "balanced_accuracy": lambda answers: _from_confusion(answers, _balanced),
    "macro_f1": lambda answers: _from_confusion(answers, _macro_f1),
}


def fold_values(answers: Answers, endpoint: str) -> dict[int, float]:
    """The endpoint of each fold by itself: the spread over folds, which mixes patients and seeds."""
    result = {}
    for fold in np.unique(answers.fold):
        part = answers.take(np.flatnonzero(answers.fold == fold))
        result[int(fold)] = float(statistic(part, endpoint)(np.ones((1, len(part.patients))))[0])
    return result
