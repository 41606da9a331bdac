"""Training a localizer on own data: the head of a CLIPSeg on masks, or the towers of a CLIP-like model on captions; the result is a checkpoint folder."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mwm.data import ReadSettings, SkippedFiles
from mwm.localize.checkpoints import quiet_transformers
from mwm.localize.train_data import ABSENT, list_examples, mask_store
from mwm.localize.train_fit import fit
from mwm.localize.train_settings import Trainee, TrainReport, TrainSettings
from mwm.localize.train_state import Checkpoints, Unfinished, compare, finished, list_hash
from mwm.localize.training import Training


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
