"""`mwm study --dry-run`: every kind of cell for some twenty steps, and from that the time of the whole study."""

from __future__ import annotations

import contextlib
import io
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mwm.data import read_list
from mwm.study.cell_files import Cell
from mwm.study.cells import make_regions, task_config
from mwm.study.config import StudyConfig
from mwm.study.sources import arm
from mwm.train import pretrain
from mwm.train.loader import joint_batch
from mwm.transfer import finetune

_STEPS = 20


def rehearse(config: StudyConfig, cells: Sequence[Cell], out: Path, scratch: Path, *, device: str, workers: int, threads: int, weights: str | None = None) -> str:
    """Time the first fold's cell of each arm and data set and add up.

    A run of some epochs and one of about twenty steps more tell what an epoch costs and what is spent around them. One process is timed alone; several
    at a time on one device share it, so the total is between the sum and the sum divided by the workers.

    Args:
        config: of the study.
        cells: all of them.
        out: folder of the study: regions that are made here are those of the study, and stay.
        scratch: where runs are written.
        device: where they run.
        workers, threads: as in `run_jobs`.
        weights: file of ImageNet weights.

    Returns:
        The total, as text; a line per kind of cell is printed as it is timed.
    """
    torch.set_num_threads(threads)
    times: dict[tuple[str, str, tuple[str, ...]], float] = {}
    pretrained: dict[tuple[str, str], float] = {}
    for cell in cells:
        key = cell.data, cell.arm, cell.tasks
        if key not in times:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # what runs say about themselves, several times each
                parts = _one(config, cell, out, scratch / f"{cell.data}-{cell.arm}", device, weights)
            if "pretrain" in parts:
                if (cell.data, cell.arm) in pretrained:  # a later block's tasks take the encoder that is there
                    parts["pretrain"] = 0.0
                elif arm(cell.arm).time_of and (known := pretrained.get((cell.data, arm(cell.arm).time_of[0]))) is not None:
                    parts["pretrain"] = known
                pretrained.setdefault((cell.data, cell.arm), parts["pretrain"])
            times[key] = sum(parts.values())
            print(f"{cell.data:14} {cell.arm:14} {times[key]:8.0f} s   " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts.items()), flush=True)
    total = sum(times[cell.data, cell.arm, cell.tasks] for cell in cells)
    return (f"{len({cell.name for cell in cells})} cells: {clock(total)} in one process after the other; with {workers} at a time between {clock(total / workers)} and "
            f"{clock(total)}. Early stopping may shorten fine-tuning.")


def _one(config: StudyConfig, cell: Cell, out: Path, scratch: Path, device: str, weights: str | None) -> dict[str, float]:
    """Seconds of each step of a cell, extrapolated."""
    seconds, run = {}, scratch / "run"
    if arm(cell.arm).pretrain:
        began = time.monotonic()
        fields = make_regions(config, out, cell.data, cell.arm, cell.fold, device)
        seconds["regions (once)"] = time.monotonic() - began
        images = out / "folds" / cell.data / f"{cell.fold}.pretrain.csv"
        full = config.pretrain_config(cell.data, images=str(images), out=str(run), seed=cell.fold, device=device, progress=False, panel_every=0, **fields)
        count = len(read_list(str(images)))
        per_epoch = max(1, count // joint_batch(count, full.batch_size, 1))

        def train(epochs: int) -> None:
            pretrain(full.replace(epochs=epochs, warmup_epochs=None, overwrite=run.exists()))

        seconds["pretrain"] = _extrapolated(train, per_epoch, full.epochs)
    for task in cell.tasks:
        settings = task_config(cell, config, out, run, task, device, weights)
        if settings.linear_probe or settings.knn:
            began = time.monotonic()
            finetune(replace(settings, out=str(scratch / task), resume=False))
            seconds[task] = time.monotonic() - began
            continue

        def train(epochs: int, settings=settings, task=task) -> None:
            shutil.rmtree(scratch / task, ignore_errors=True)
            finetune(replace(settings, out=str(scratch / task), resume=False, epochs=epochs, patience=epochs))

        steps = max(1, _rows(out / "folds" / cell.data / f"{cell.fold}.csv") // settings.batch_size)
        seconds[task] = _extrapolated(train, steps, settings.epochs)
    shutil.rmtree(scratch, ignore_errors=True)
    return seconds


def _extrapolated(train: Callable[[int], None], per_epoch: int, epochs: int) -> float:
    """Seconds of `epochs` epochs, from two short runs."""
    more = max(1, math.ceil(_STEPS / per_epoch))
    train(1)  # compiles and warms up
    spent = []
    for length in (1, 1 + more):
        began = time.monotonic()
        train(length)
        spent.append(time.monotonic() - began)
    epoch = max(0.0, spent[1] - spent[0]) / more
    return spent[0] + epoch * (epochs - 1)


def _rows(fold: Path) -> int:
    """Training rows of a fold."""
    return len(read_list(str(fold), split="train"))


def clock(seconds: float) -> str:
    """A time in words: seconds, minutes or hours."""
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
