"""Training a localizer on own data: the head of a CLIPSeg on masks, or the towers of a CLIP-like model on captions; the result is a checkpoint folder."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from mwm.data import ReadSettings, RegionStore, SkippedFiles
from mwm.localize.checkpoints import quiet_transformers
from mwm.localize.train_data import ABSENT, Examples, list_examples, mask_store
from mwm.localize.train_fit import fit
from mwm.localize.train_state import Checkpoints, Unfinished, compare, finished, list_hash
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


def train_localizer(
    images: str | Path, masks: str | Path | None = None, checkpoint: str | Path = "clipseg-rd64", out: str | Path = "localizer", *, prompts: Sequence[str] = (),
    absent: Sequence[str] = (), settings: TrainSettings | None = None, read: ReadSettings | None = None, split: str | None = None, root: str | Path | None = None,
    revision: str | None = None, device: Any = None, offline: bool = False, progress: bool = True, resume: bool = False, checkpoints: Checkpoints | None = None,
    checkpoint_minutes: float = 10.0,
) -> TrainReport:
    """Fine-tune a localizer and save it.

    A CLIPSeg checkpoint: CLIP stays as it is, the decoder learns masks (binary cross-entropy and Dice). Each image is shown with the prompt of its CSV row, else with one of
    `prompts`, drawn anew each epoch; some with a text about something absent and an empty mask. A CLIP-like checkpoint: both towers learn from captions (`dhn_nce`).
    One process; under torchrun it is refused.

    With `checkpoints` a killed training goes on from OUT.unfinished, on the CPU bit for bit as if it had not been killed. Everything that decides the result but the device and
    `workers` must be as before.

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
        revision: Commit, branch or tag of the checkpoint's hub name.
        device: Where it runs.
        offline: Use only what is on disk.
        progress: Show a progress bar, and a line per epoch, on stderr.
        resume: Go on with a training that was killed; a finished one is left as it is.
        checkpoints: How unfinished work is kept, `mwm.train.checkpoint`; None keeps nothing.
        checkpoint_minutes: At least so long between two checkpoints.

    Returns:
        What was done; print it.

    Raises:
        ValueError: the checkpoint, data or settings do not fit; one sentence.
    """
    settings, read, out = settings or TrainSettings(), read or ReadSettings(), Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (resume and finished(out)):
        raise ValueError(f"localize train: out must be a new folder, got {str(out)!r}, which is there. Choose another --out.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("localize train: it must run as one process, got several under torchrun. Start it without torchrun.")
    unfinished = Unfinished(out, checkpoints, checkpoint_minutes, resume)
    texts = [text for text in prompts if text.strip()]
    trainee = _trainee(checkpoint, revision, device, offline, texts, list(absent) or list(ABSENT), mask_store(masks), settings, read)
    if trainee.kind == "towers" and masks is not None:
        raise ValueError("localize train: masks must be left out for a CLIP-like checkpoint, which learns from captions. Give a CLIPSeg checkpoint to learn from masks.")
    examples = list_examples(images, masks=trainee.masks, caption=trainee.kind == "towers", split=split, root=root, read=read, val_share=settings.val_share, seed=settings.seed)
    trainee.check(examples)
    training = Training("masks" if trainee.kind == "head" else "captions", len(examples.train) + len(examples.val), list_hash(examples, trainee.masks), trainee.training)
    asked = {**{name: value for name, value in asdict(settings).items() if name != "workers"}, "prompts": texts, "absent": list(absent), "read": read.to_dict(),
             "checkpoint": trainee.fingerprint, "images": training.images, "list": training.list}
    asked = json.loads(json.dumps(asked))
    if finished(out):
        return _finished(out, asked)
    skipped = SkippedFiles()
    report = TrainReport(out, trainee.kind, train=len(examples.train), val=len(examples.val))
    fit(trainee, examples, settings, report, skipped, unfinished, unfinished.begin(asked, resume), progress)
    report.skipped = len({name for name, _ in skipped})
    _save(trainee, out, training, {"kind": report.kind, "settings": asdict(settings), "best": report.best, "train": report.train, "val": report.val, "skipped": report.skipped,
                                   "history": report.history, "prompts": list(prompts), "trained_on": training.to_dict(), "asked": asked})
    unfinished.drop()
    return report


def _finished(out: Path, asked: dict[str, Any]) -> TrainReport:
    """The report of a training that --resume finds done."""
    advice = "Choose another --out to train anew."
    try:
        told = json.loads((out / "training.json").read_text(encoding="utf-8"))
        history = [row | {"train_loss": math.nan if row["train_loss"] is None else row["train_loss"]} for row in told["history"]]
        report = TrainReport(out, told["kind"], history, told["best"], told["train"], told["val"], told["skipped"])
        before = told["asked"]
        str(report)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"localize train: training.json in {str(out)!r} must be what an earlier training wrote, but cannot be read. {advice}") from error
    compare(before, asked, advice)
    return report


def _trainee(
    checkpoint: str | Path, revision: str | None, device: Any, offline: bool, prompts: list[str], absent: list[str], masks: Any, settings: TrainSettings, read: ReadSettings
) -> Trainee:
    from mwm.localize.train_head import HeadTrainee
    from mwm.localize.train_towers import TowersTrainee, is_clip_like

    if is_clip_like(checkpoint, offline, revision):
        return TowersTrainee(checkpoint, revision, device, offline, settings, read)
    return HeadTrainee(checkpoint, revision, device, offline, prompts, absent, masks, settings, read)


def _save(trainee: Trainee, out: Path, training: Training, told: dict[str, Any]) -> None:
    """All or nothing: a folder beside it, then a rename."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with quiet_transformers(bars=False):
            trainee.save(temporary, training)
        (temporary / "training.json").write_text(json.dumps(told, indent=1).replace("NaN", "null") + "\n")
        if out.is_dir():
            out.rmdir()
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
