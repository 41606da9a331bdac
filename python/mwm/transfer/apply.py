"""`predict`: a folder of results applied to other images; one door to every task."""

from __future__ import annotations

import dataclasses
import importlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mwm.transfer.config import TransferError, check_kinds
from mwm.transfer.stored import FACTS, read_model

#: Where each task's function (results, images, out, *, its fields and the common ones) lives, and which fields are its own.
PREDICT = {"classify": ("mwm.transfer.classify_apply:predict_classes", ()), "segment": ("mwm.transfer.segment_predict:predict_masks", ("probabilities",)),
           "detect": ("mwm.transfer.detect_predict:predict_objects", ("overlays", "least_score"))}
COMMON = ("split", "batch_size", "workers", "device", "strict", "overwrite", "progress")


def _help(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class PredictConfig:
    """Settings of a prediction, checked on creation.

    Raises:
        TransferError: a value is of the wrong kind or out of its range; the message names the field.
    """

    results: str = _help("", "folder that mwm finetune wrote")
    images: str = _help("", "folder, glob, text list or index CSV of the images")
    out: str = _help("", "folder of the answers; must not exist, unless overwrite")
    overwrite: bool = _help(False, "replace earlier answers")
    split: str | None = _help(None, "take only rows of this split of an index CSV")
    batch_size: int = _help(16, "images per step")

    # segment
    probabilities: bool = _help(False, "segment: write the probabilities of each class beside the masks")

    # detect
    overlays: bool = _help(False, "detect: draw what was found on every image")
    least_score: float = _help(0.05, "detect: leave out objects of a lower score")

    strict: bool = _help(False, "stop at an unreadable file instead of leaving it out")
    workers: int = _help(0, "threads that read images; 0 = one per CPU, at most 8")
    device: str = _help("auto", "auto | cpu | cuda | cuda:N")
    progress: bool = _help(True, "show progress bars")

    def __post_init__(self) -> None:
        for name in ("results", "images", "out"):
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        check_kinds(self, "predict")
        for name, wanted in (("results", "a folder that mwm finetune wrote"), ("images", "a folder, glob, text list or index CSV"),
                             ("out", "a folder for the answers (--out FOLDER)")):
            self._require(name, bool(getattr(self, name)), wanted)
        self._require("batch_size", self.batch_size >= 1, "at least 1")
        self._require("workers", self.workers >= 0, "0 or more")
        self._require("least_score", 0 <= self.least_score <= 1, "in [0, 1]")

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise TransferError(f"predict: {name} must be {wanted}, got {getattr(self, name)!r}.")


def predict(config: PredictConfig) -> Path:
    """Apply a trained model to images. The folder of results is all that is needed; the run it began from is not.

    Args:
        config: What to do.

    Returns:
        The folder of the answers: predictions.csv (classify: file, predicted, and the probability of every class), masks (segment) or predictions.json in COCO
        format (detect).

    Raises:
        TransferError: the folder of results is not whole, or a setting is of another task; the message says what to do.
        FileExistsError: `out` exists and `overwrite` is off, or it holds a trained model.
    """
    out = Path(config.out)
    if (out / FACTS).exists():
        raise FileExistsError(f"predict: out must be a folder for answers, got {out}, which holds a trained model. Choose another.")
    stored = read_model(config.results)
    if stored.task not in PREDICT:
        raise TransferError(f"predict: the task of RESULTS must be {' | '.join(PREDICT)}, got {stored.task!r}. Use the version of mwm that wrote it.")
    place, own = PREDICT[stored.task]
    for field_ in dataclasses.fields(config):
        others = [task for task, (_, names) in PREDICT.items() if field_.name in names and task != stored.task]
        if others and getattr(config, field_.name) != field_.default:
            raise TransferError(f"predict: {field_.name} must be left out for a model of task {stored.task}, got {getattr(config, field_.name)!r}. It is for {others[0]}.")
    module, _, name = place.partition(":")
    answer = getattr(importlib.import_module(module), name)
    answer(config.results, config.images, out, **{key: getattr(config, key) for key in (*COMMON, *own)})
    return out
