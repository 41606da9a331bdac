"""What a fine-tuning run is told."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

TASKS = ("classify",)


class TransferError(ValueError):
    """A task that cannot start or go on; the message says what to do."""


def _help(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a fine-tuning run, checked on creation.

    Raises:
        TransferError: a value is out of its range; the message names the field.
    """

    run: str = _help("", "folder of a run made by mwm pretrain, or its encoder.safetensors")
    data: str = _help("", "folder with one folder per class (also below train/ val/ test/), or an index CSV with labels")
    task: str = _help("classify", "what to learn: classify")
    out: str | None = _help(None, "folder of the results (default: RUN/finetune or RUN/linear-probe)")
    overwrite: bool = _help(False, "replace existing results")
    linear_probe: bool = _help(False, "keep the encoder frozen and fit a logistic regression on its pooled features")
    labels: str | None = _help(None, 'labels to keep, separated by commas, for example "bacterial,viral"; default: all')
    epochs: int = _help(30, "most epochs of full fine-tuning")
    patience: int = _help(8, "stop after this many epochs without a better validation loss")
    batch_size: int = _help(32, "images per step")
    lr: float = _help(3e-4, "learning rate of the head and the last layers")
    layer_decay: float = _help(0.75, "factor on the learning rate from one stage to the one before it")
    weight_decay: float = _help(0.05, "AdamW weight decay")
    label_smoothing: float = _help(0.0, "share of the target spread over all classes")
    balanced: bool = _help(True, "weight classes by the inverse of their frequency in training")
    flip: bool = _help(False, "flip half of the training images left to right")
    crop: float = _help(0.8, "least share of the image's area in a random crop; 1 = none")
    val_share: float = _help(0.2, "share of the training patients put aside for validation where DATA has no val split")
    test_share: float = _help(0.25, "share of the patients put aside for the test where DATA has no test split")
    intensity: str | None = _help(None, "auto | percentile | window=C,W | minmax; default: as the run read its images")
    strict: bool = _help(False, "stop at an unreadable file instead of leaving it out")
    bootstrap: int = _help(2000, "draws of the intervals")
    seed: int = _help(0, "seed of splits, order, crops, head")
    workers: int = _help(0, "processes that read images")
    device: str = _help("auto", "auto | cpu | cuda | cuda:N")
    progress: bool = _help(True, "show progress bars")

    def __post_init__(self) -> None:
        for name in ("run", "data", "out"):  # paths are stored as text, so that the settings can be written down
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        self._require("task", self.task in TASKS, " | ".join(TASKS))
        self._require("run", bool(self.run), "the folder of a run")
        self._require("data", bool(self.data), "a folder or an index CSV")
        for name in ("epochs", "patience", "batch_size", "bootstrap"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("val_share", "test_share"):
            self._require(name, 0 < getattr(self, name) < 1, "between 0 and 1")
        self._require("crop", 0 < self.crop <= 1, "in (0, 1]")
        self._require("lr", self.lr > 0, "positive")
        self._require("layer_decay", 0 < self.layer_decay <= 1, "in (0, 1]")
        self._require("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")
        self._require("workers", self.workers >= 0, "0 or more")
        self._require("labels", self.labels is None or bool(self.label_names), "names separated by commas")

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise TransferError(f"finetune: {name} must be {wanted}, got {getattr(self, name)!r}.")

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """`labels` as names."""
        return None if self.labels is None else tuple(name.strip() for name in self.labels.split(",") if name.strip())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return dataclasses.asdict(self)
