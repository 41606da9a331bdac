"""What `mwm localize train` is told, what it asks of a model in training, and what it reports."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from mwm.data import RegionStore, SkippedFiles
from mwm.localize.train_data import Examples
from mwm.localize.training import Training


@dataclass(frozen=True)
class TrainSettings:
    """How a localizer is trained.

    Attributes:
        epochs: Rounds over the images.
        batch_size: Images of a step; None for 16 (head) or 64 (towers, as the paper of DHN-NCE).
        lr: Peak learning rate of AdamW; None for 1e-3 (head) or 1e-6 (towers).
        weight_decay: Of AdamW.
        warmup: Share of the steps in which the rate rises, in [0, 1); a cosine follows.
        absent_share: Head: share of the images that are shown with a text about something else and an empty mask, in [0, 1). Without them a head that sees one
            prompt learns not to read it.
        temperature: Towers: of `dhn_nce`.
        beta_image: Towers: of `dhn_nce`.
        beta_text: Towers: of `dhn_nce`.
        val_share: Share of the patients that choose the best epoch, where the CSV names no val split, in (0, 1).
        seed: Of order, texts and split.
        precision: "fp32", or "bf16": matrix products in bfloat16; weights, optimizer and losses stay float32.
        workers: Threads that read images.
    """

    epochs: int = 20
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float = 0.01
    warmup: float = 0.1
    absent_share: float = 0.25
    temperature: float = 0.6
    beta_image: float = 0.15
    beta_text: float = 0.15
    val_share: float = 0.15
    seed: int = 0
    precision: str = "fp32"
    workers: int = 2

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"localize train: {name} must be a whole number of at least 1, got {value!r}.")
        for name, fits, said in (("lr", lambda v: v is None or 0 < v < math.inf, "above 0"), ("weight_decay", lambda v: 0 <= v < math.inf, "at least 0"),
                                 ("warmup", lambda v: 0 <= v < 1, "in [0, 1)"), ("absent_share", lambda v: 0 <= v < 1, "in [0, 1)"),
                                 ("val_share", lambda v: 0 < v < 1, "in (0, 1)"), ("workers", lambda v: v >= 0, "at least 0")):
            if not fits(getattr(self, name)):
                raise ValueError(f"localize train: {name} must be {said}, got {getattr(self, name)!r}.")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"localize train: precision must be fp32 or bf16, got {self.precision!r}.")


class Trainee(Protocol):
    """A model in training.

    Attributes:
        kind: "head" or "towers".
        batch_size: Where the settings name none.
        lr: Likewise.
        masks: Where masks are found, or None.
        fingerprint: Of the checkpoint that it began as.
        training: What that checkpoint had learnt from in an earlier training, or None.
    """

    kind: str
    batch_size: int
    lr: float
    masks: RegionStore | None
    fingerprint: str
    training: Training | None

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        ...

    def losses(self, examples: Examples, part: str, epoch: int, batch_size: int, skipped: SkippedFiles, begin: int = 0) -> Iterable[tuple[Tensor, int, int]]:
        """Of each batch of "train" or "val" from place `begin` of the epoch's order on: loss, number of images, and the place behind it."""
        ...

    def steps(self, count: int, batch_size: int) -> int:
        """Steps of an epoch over so many images."""
        ...

    def weights(self) -> nn.Module:
        """The module whose best state is kept."""
        ...

    def check(self, examples: Examples) -> None:
        """Refuse data that cannot be learned from."""
        ...

    def restore(self) -> None:
        """Back to the weights as they came."""
        ...

    def save(self, folder: Path, training: Training) -> None:
        """Write a folder that the localizer loads, and in its config.json what it learnt from."""
        ...


@dataclass
class TrainReport:
    """What a training did.

    Attributes:
        out: The checkpoint folder.
        kind: "head" or "towers".
        history: One dict per epoch: epoch, train_loss, val_loss.
        best: Epoch that was saved, the one of least val_loss; 0 is the model as it came.
        train: Images learned from.
        val: Images that chose the epoch.
        skipped: Files that could not be read.
    """

    out: Path
    kind: str
    history: list[dict[str, float]] = field(default_factory=list)
    best: int = 0
    train: int = 0
    val: int = 0
    skipped: int = 0

    def __str__(self) -> str:
        localizer = "clipseg" if self.kind == "head" else "bottleneck"
        first, best = self.history[0]["val_loss"], self.history[self.best]["val_loss"]
        lines = [f"trained: {self.kind}, {self.train} images, {self.val} to validate; val loss {first:.4f} → {best:.4f} (epoch {self.best} of {len(self.history) - 1})",
                 f"         {self.out}: mwm localize IMAGES --prompt TEXT --localizer {localizer} --checkpoint {self.out}"]
        if self.best == 0:
            lines.append("warning: no epoch was better than the model as it came. Lower --lr, or give more images.")
        if self.skipped:
            lines.append(f"skipped: {self.skipped} files that cannot be read")
        return "\n".join(lines)
