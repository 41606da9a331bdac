"""The loop of `mwm localize train`: AdamW with warm-up and cosine, the best epoch kept, and at any step a state from which the rest follows."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mwm.data import SkippedFiles
from mwm.localize.train_data import Examples
from mwm.localize.train_settings import Trainee, TrainReport, TrainSettings
from mwm.localize.train_state import Unfinished


def fit(
    trainee: Trainee, examples: Examples, settings: TrainSettings, report: TrainReport, skipped: SkippedFiles, unfinished: Unfinished, state: dict[str, Any] | None, progress: bool
) -> None:
    """Train, and leave the best epoch's weights in the model.

    Args:
        trainee: The model.
        examples: The images.
        settings: How.
        report: Gets the losses and the best epoch.
        skipped: Gets files that cannot be read.
        unfinished: Where checkpoints go.
        state: What an earlier call kept, or None.
        progress: Show a progress bar, and a line per epoch.

    Raises:
        ValueError: the loss does not stay finite, or no image can be read.
    """
    batch = settings.batch_size or trainee.batch_size
    per_epoch = trainee.steps(len(examples.train), batch)
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=settings.lr or trainee.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(settings.epochs * per_epoch, settings.warmup))
    epoch, position, told, best = 1, 0, [], None

    def keep() -> None:
        unfinished.keep({"epoch": epoch, "position": position, "told": told, "history": report.history, "best_epoch": report.best, "weights": trainee.weights().state_dict(),
                         "best": best, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})

    if state is None:
        start = _mean((loss.detach(), count) for loss, count, _ in trainee.losses(examples, "val", 0, batch, skipped))
        report.history.append({"epoch": 0, "train_loss": math.nan, "val_loss": start})
        keep()
    else:
        epoch, position, told, best = (state[name] for name in ("epoch", "position", "told", "best"))
        report.history, report.best = state["history"], state["best_epoch"]
        trainee.weights().load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    with tqdm(total=settings.epochs * per_epoch, initial=schedule.last_epoch, desc="train", unit="step", disable=None if progress else True) as bar:
        while epoch <= settings.epochs:
            for loss, count, place in trainee.losses(examples, "train", epoch, batch, skipped, position):
                value = float(loss.detach())
                if not math.isfinite(value):
                    unfinished.drop()  # going on would end here again
                    raise ValueError(f"localize train: the loss must stay finite, got {value} in epoch {epoch}. Lower --lr.")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                position = place
                told.append([value, count])
                bar.update()
                if unfinished.due():
                    keep()
            val = _mean((loss.detach(), count) for loss, count, _ in trainee.losses(examples, "val", 0, batch, skipped))
            report.history.append({"epoch": epoch, "train_loss": _mean(told), "val_loss": val})
            bar.set_postfix(val_loss=f"{val:.4f}")
            if val < min(row["val_loss"] for row in report.history[:-1]):
                report.best, best = epoch, deepcopy({name: tensor.cpu() for name, tensor in trainee.weights().state_dict().items()})
            if progress:
                best_yet = ", the best so far" if report.best == epoch else ""
                bar.write(f"epoch {epoch} of {settings.epochs}: train loss {_mean(told):.4f}, val loss {val:.4f}{best_yet}", sys.stderr)
            epoch, position, told = epoch + 1, 0, []
            if unfinished.due():
                keep()
    if best is not None:
        trainee.weights().load_state_dict(best)
    else:
        trainee.restore()


def _mean(losses: Iterable[tuple[Tensor | float, int]]) -> float:
    total = count = 0.0
    for loss, images in losses:
        total, count = total + float(loss) * images, count + images
    if not count:
        raise ValueError("localize train: batches must hold images, got none that can be read. Look at the files, or give more images than one batch leaves out.")
    return total / count


def _rate(steps: int, warmup: float) -> Callable[[int], float]:
    rising = max(1, round(warmup * steps))
    return lambda step: min(1.0, (step + 1) / rising) * 0.5 * (1 + math.cos(math.pi * max(0, step - rising) / max(1, steps - rising)))
