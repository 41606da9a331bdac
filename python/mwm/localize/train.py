"""Training a localizer on own data: the head of a CLIPSeg on masks, or the towers of a CLIP-like model on captions; the result is a checkpoint folder."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mwm.data import ReadSettings, RegionStore, SkippedFiles
from mwm.localize.checkpoints import quiet_transformers
from mwm.localize.train_data import ABSENT, Examples, list_examples, mask_store


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


class Trainee(Protocol):
    """A model in training.

    Attributes:
        kind: "head" or "towers".
        batch_size: Where the settings name none.
        lr: Likewise.
        masks: Where masks are found, or None.
    """

    kind: str
    batch_size: int
    lr: float
    masks: RegionStore | None

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        ...

    def losses(self, examples: Examples, part: str, epoch: int, batch_size: int, skipped: SkippedFiles) -> Iterable[tuple[Tensor, int]]:
        """Loss and number of images of each batch of "train" or "val"."""
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

    def save(self, folder: Path) -> None:
        """Write a folder that the localizer loads."""
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


def train_localizer(
    images: str | Path, masks: str | Path | None = None, checkpoint: str | Path = "clipseg-rd64", out: str | Path = "localizer", *, prompts: Sequence[str] = (),
    absent: Sequence[str] = (), settings: TrainSettings | None = None, read: ReadSettings | None = None, split: str | None = None, root: str | Path | None = None,
    device: Any = None, offline: bool = False, progress: bool = True,
) -> TrainReport:
    """Fine-tune a localizer and save it.

    A CLIPSeg checkpoint: CLIP stays as it is, the decoder learns masks (binary cross-entropy and Dice). Each image is shown with the prompt of its CSV row, else with one of
    `prompts`, drawn anew each epoch; some with a text about something absent and an empty mask. A CLIP-like checkpoint: both towers learn from captions (`dhn_nce`).

    Args:
        images: Folder, glob, text list or index CSV. Rows of the split test are never read.
        masks: Folder of masks named like the images; None for the CSV's column mask. Not for CLIP-like checkpoints.
        checkpoint: Preset, hub name or folder: CLIPSeg, CLIP, SigLIP or a dual encoder of transformers.
        out: New folder of the result.
        prompts: Texts of the target.
        absent: Texts about something that the images do not show; empty for some that fit no medical image.
        settings: See `TrainSettings`.
        read: How images are read.
        split: Only this split of an index CSV.
        root: Folder that the CSV's paths start from.
        device: Where it runs.
        offline: Use only what is on disk.
        progress: Show a progress bar.

    Returns:
        What was done; print it.

    Raises:
        ValueError: the checkpoint, data or settings do not fit; one sentence.
    """
    settings, read, out = settings or TrainSettings(), read or ReadSettings(), Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"localize train: out must be a new folder, got {str(out)!r}, which is there. Choose another --out.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("localize train: it must run as one process, got several under torchrun. Start it without torchrun.")
    torch.manual_seed(settings.seed)
    trainee = _trainee(checkpoint, device, offline, [text for text in prompts if text.strip()], list(absent) or list(ABSENT), mask_store(masks), settings, read)
    if trainee.kind == "towers" and masks is not None:
        raise ValueError("localize train: masks must be left out for a CLIP-like checkpoint, which learns from captions. Give a CLIPSeg checkpoint to learn from masks.")
    examples = list_examples(images, masks=trainee.masks, caption=trainee.kind == "towers", split=split, root=root, read=read, val_share=settings.val_share, seed=settings.seed)
    trainee.check(examples)
    skipped = SkippedFiles()
    report = TrainReport(out, trainee.kind, train=len(examples.train), val=len(examples.val))
    _fit(trainee, examples, settings, report, skipped, progress)
    report.skipped = len({name for name, _ in skipped})
    _save(trainee, out, {"kind": report.kind, "settings": asdict(settings), "best": report.best, "train": report.train, "val": report.val, "history": report.history,
                         "prompts": list(prompts)})
    return report


def _trainee(
    checkpoint: str | Path, device: Any, offline: bool, prompts: list[str], absent: list[str], masks: Any, settings: TrainSettings, read: ReadSettings
) -> Trainee:
    from mwm.localize.train_head import HeadTrainee
    from mwm.localize.train_towers import TowersTrainee, is_clip_like

    if is_clip_like(checkpoint, offline):
        return TowersTrainee(checkpoint, device, offline, settings, read)
    return HeadTrainee(checkpoint, device, offline, prompts, absent, masks, settings, read)


def _fit(trainee: Trainee, examples: Examples, settings: TrainSettings, report: TrainReport, skipped: SkippedFiles, progress: bool) -> None:
    """AdamW with warm-up and cosine; leaves the best epoch's weights in the model."""
    batch = settings.batch_size or trainee.batch_size
    per_epoch = trainee.steps(len(examples.train), batch)
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=settings.lr or trainee.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(settings.epochs * per_epoch, settings.warmup))
    start = _mean(trainee.losses(examples, "val", 0, batch, skipped))
    report.history.append({"epoch": 0, "train_loss": math.nan, "val_loss": start})
    best = None
    with tqdm(total=settings.epochs * per_epoch, desc="train", unit="step", disable=None if progress else True) as bar:
        for epoch in range(1, settings.epochs + 1):
            told = []
            for loss, count in trainee.losses(examples, "train", epoch, batch, skipped):
                if not bool(torch.isfinite(loss)):
                    raise ValueError(f"localize train: the loss must stay finite, got {float(loss.detach())} in epoch {epoch}. Lower --lr.")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                told.append((loss.detach(), count))
                bar.update()
            val = _mean(trainee.losses(examples, "val", 0, batch, skipped))
            report.history.append({"epoch": epoch, "train_loss": _mean(told), "val_loss": val})
            bar.set_postfix(val_loss=f"{val:.4f}")
            if val < min(row["val_loss"] for row in report.history[:-1]):
                report.best, best = epoch, deepcopy({name: value.cpu() for name, value in trainee.weights().state_dict().items()})
    if best is not None:
        trainee.weights().load_state_dict(best)
    else:
        trainee.restore()


def _mean(losses: Iterable[tuple[Tensor, int]]) -> float:
    total = count = 0.0
    for loss, images in losses:
        total, count = total + float(loss.detach()) * images, count + images
    if not count:
        raise ValueError("localize train: batches must hold images, got none that can be read. Look at the files, or give more images than one batch leaves out.")
    return total / count


def _rate(steps: int, warmup: float) -> Callable[[int], float]:
    rising = max(1, round(warmup * steps))
    return lambda step: min(1.0, (step + 1) / rising) * 0.5 * (1 + math.cos(math.pi * max(0, step - rising) / max(1, steps - rising)))


def _save(trainee: Trainee, out: Path, told: dict[str, Any]) -> None:
    """All or nothing: a folder beside it, then a rename."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with quiet_transformers(bars=False):
            trainee.save(temporary)
        (temporary / "training.json").write_text(json.dumps(told, indent=1).replace("NaN", "null") + "\n")
        if out.is_dir():
            out.rmdir()
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
