"""The shortcut row: how far a classifier comes that sees nothing of the anatomy, only how an image was taken and stored.

Features of the source image, before any cropping or resizing: width, height, mean, standard deviation, and mean of the border (a frame of 5 % of
the shorter side). A logistic regression on them, standardised, its strength chosen on the validation split, answers the same folds as the arms.
A network that is no better than this row may have learned the hospital.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mwm.data import ReadSettings, Record, UnreadableImage, read_image, read_list
from mwm.data.csv_cells import file_cell, text_cell
from mwm.study.endpoints import Answers
from mwm.study.errors import StudyError
from mwm.train.checkpoint import write_text
from mwm.transfer.metrics import auroc

FEATURES = ("width", "height", "mean", "standard deviation", "border")
_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Shortcut:
    """Answers of the shortcut classifier.

    Attributes:
        answers: Test answers of all folds.
        classes: Names.
        strengths: Chosen strength of each fold.
    """

    answers: Answers
    classes: tuple[str, ...]
    strengths: dict[int, float]


def features(record: Record) -> NDArray:
    """The five features of one image. float64 [5]: pixels, pixels, and three values in [0, 1]."""
    image = read_image(record, ReadSettings(), channels=1)[0].double().numpy()
    height, width = image.shape
    frame = max(1, round(0.05 * min(height, width)))
    inner = np.zeros_like(image, dtype=bool)
    inner[frame : height - frame, frame : width - frame] = True
    border = image[~inner]
    return np.array([width, height, image.mean(), image.std(), border.mean()])


def shortcut(folds: Sequence[str | Path], *, progress: bool = False) -> Shortcut:
    """Fit and test the shortcut classifier on every fold; images that cannot be read are left out, as the tasks leave them out.

    Args:
        folds: CSV of each fold, with the splits train, val, test.
        progress: Show a bar.

    Raises:
        StudyError: the folds differ in their classes.
    """
    known: dict[str, NDArray | None] = {}
    parts, strengths, names = [], {}, None
    for fold, path in enumerate(folds):
        records = [record for record in read_list(path) if record.label and record.split in ("train", "val", "test")]
        classes = tuple(sorted({record.label for record in records}))
        if names not in (None, classes):
            raise StudyError(f"shortcut: all folds must have the same classes, got {', '.join(names)} and {', '.join(classes)}. Make the folds again.")
        names = classes
        for record in tqdm(records, desc=f"shortcut, fold {fold}", unit="img", disable=not progress, leave=False):
            if record.name not in known:
                try:
                    known[record.name] = features(record)
                except UnreadableImage:
                    known[record.name] = None
        records = [record for record in records if known[record.name] is not None]
        of = {split: [record for record in records if record.split == split] for split in ("train", "val", "test")}
        x = {split: np.stack([known[record.name] for record in held]) for split, held in of.items()}
        y = {split: np.array([classes.index(record.label) for record in held]) for split, held in of.items()}
        scores, strengths[fold] = _answer(x, y)
        parts.append((fold, of["test"], y["test"], scores))
    answers = Answers(tuple(r.name for _, held, _, _ in parts for r in held), np.concatenate([np.full(len(held), fold) for fold, held, _, _ in parts]),
                      tuple(r.patient or f"image {r.name}" for _, held, _, _ in parts for r in held), np.concatenate([y for *_, y, _ in parts]),
                      np.concatenate([s for *_, s in parts]))
    return Shortcut(answers, names or (), strengths)


def _answer(x: dict[str, NDArray], y: dict[str, NDArray]) -> tuple[NDArray, float]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = {}
    for strength in _STRENGTHS:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, class_weight="balanced", max_iter=2000))
        fitted[strength] = model.fit(x["train"], y["train"])
    best = max(_STRENGTHS, key=lambda strength: (auroc(y["val"], fitted[strength].predict_proba(x["val"])), -strength))
    return fitted[best].predict_proba(x["test"]), best


def write_shortcut(result: Shortcut, path: str | Path) -> Path:
    """The answers as a CSV with the columns of predictions.csv, and the fold."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["file", "fold", "split", "label", "predicted", *(f"p_{name}" for name in result.classes)])
    for k, name in enumerate(result.answers.file):
        row = result.answers.scores[k]
        true, found = text_cell(result.classes[int(result.answers.truth[k])]), text_cell(result.classes[int(row.argmax())])
        writer.writerow([file_cell(name), int(result.answers.fold[k]), "test", true, found, *(f"{p:.6f}" for p in row)])
    write_text(Path(path), buffer.getvalue())
    return Path(path)
