"""A cell of a study: one arm on one fold of one data set, from regions to the results of every task, in steps that each survive a kill."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from mwm.data import ReadSettings, UnreadableImage, read_image, read_list
from mwm.study.cell_files import (
    PROGRESS,
    Cell,
    base_fingerprint,
    earlier_failures,
    exported,
    fingerprint,
    finished,
    has_results,
    held_hashes,
    locked,
    measured,
    read_facts,
    refuse_other_settings,
    task_hashes,
    weights_hash,
    write_facts,
)
from mwm.study.config import StudyConfig
from mwm.study.errors import StudyError
from mwm.study.same_time import scaled_epochs
from mwm.study.sources import arm, region_fields
from mwm.train import pretrain
from mwm.train.record import commit
from mwm.transfer import finetune

_CHECKPOINT_MINUTES = 3.0
"""Between checkpoints, where the file does not say: what the end of a budget cuts off goes on from there. With the ten minutes of `mwm pretrain` a study that is
run in pieces of nine would begin a longer pre-training again and again."""


def make_regions(config: StudyConfig, out: Path, data: str, name: str, fold: int, device: str) -> dict[str, Any]:
    """The regions of an arm on a fold, made where they are missing, as fields of `PretrainConfig`."""
    folder = out / "regions" / data / str(fold)
    with locked(folder / ".lock"):
        return region_fields(arm(name), config.source_of(data), out / "folds" / data / f"{fold}.csv", folder, seed=fold, device=device,
                             read=ReadSettings(**config.data[data].read))


def run_cell(cell: Cell, config: StudyConfig, out: Path, device: str, weights: str | None = None) -> dict[str, Any]:
    """Pre-train and run the tasks; what is there already is not done again.

    Args:
        cell: which.
        config: of the study.
        out: its folder.
        device: where it runs.
        weights: file of ImageNet weights, for the arm `imagenet`.

    Returns:
        What cell.json holds.

    Raises:
        ValueError: a step refused, or the cell holds results of other settings; cell.json is as before.
    """
    refuse_other_settings(cell, config, out, weights)
    folder, kind, source = cell.folder(out), arm(cell.arm), config.source_of(cell.data)
    folder.mkdir(parents=True, exist_ok=True)
    run = folder / "run"
    if finished(cell, out, config, weights):  # by another call, which this one has waited for: its device and commit stay
        _tidy(run, _keep(cell, config, out))
        return read_facts(folder)
    before = {**read_facts(folder), **read_facts(folder, PROGRESS)}
    seconds = dict(before.get("wall_seconds", {}))
    facts = {"data_set": cell.data, "arm": cell.arm, "seed": cell.fold, "fold": cell.fold, "status": "running", "error": None, "says": kind.says, "regions": kind.label(source),
             "uses_labels": kind.uses_labels(source), "supervised_region_source": kind.supervised(source), "wall_seconds": seconds,
             "config_hash": fingerprint(cell, config, weights), "base_hash": base_fingerprint(cell, config, weights),
             "task_hashes": {**task_hashes(cell, config), **held_hashes(before, cell, config, out)}, "device": device_name(device), "commit": commit(),
             **earlier_failures(read_facts(folder)),
             **({"weights_hash": weights_hash(weights)} if weights and kind.init == "imagenet" else {})}
    if kind.pretrain and cell.open_tasks(out):
        facts |= _pretrained(cell, config, out, run, seconds, device)
    elif "time_of" in before:
        facts |= {name: before[name] for name in ("epochs", "time_of")}
    for task in cell.tasks:
        if not has_results(folder, task):
            write_facts(folder, facts | measured(run), PROGRESS)
            began = time.monotonic()
            finetune(task_config(cell, config, out, run, task, device, weights))
            seconds[task] = round(time.monotonic() - began, 2)
    facts |= {"status": "done", **measured(run)}
    write_facts(folder, facts)
    _tidy(run, _keep(cell, config, out))
    return facts


def _keep(cell: Cell, config: StudyConfig, out: Path) -> str:
    """What stays of a cell: what is still to come of it needs its encoder, whatever is kept of finished ones."""
    planned = config.tasks_of(cell.data, cell.arm) or cell.tasks
    return "encoder" if config.keep == "results" and any(not has_results(cell.folder(out), task) for task in planned) else config.keep


def _pretrained(cell: Cell, config: StudyConfig, out: Path, run: Path, seconds: dict[str, float], device: str) -> dict[str, Any]:
    """Pre-train a cell where its encoder is not there; returns what cell.json says of an arm whose epochs were reckoned."""
    fields = make_regions(config, out, cell.data, cell.arm, cell.fold, device)
    settings = config.pretrain_config(cell.data, images=str(out / "folds" / cell.data / f"{cell.fold}.pretrain.csv"), out=str(run), seed=cell.fold, device=device,
                                      progress=False, panel_every=0, **fields)
    if "checkpoint_minutes" not in config.pretrain:
        settings = settings.replace(checkpoint_minutes=_CHECKPOINT_MINUTES)
    scaled = scaled_epochs(cell, out, settings.epochs) if arm(cell.arm).time_of else {}
    if scaled:
        settings = settings.replace(epochs=scaled["epochs"])
    if not exported(run):
        began = time.monotonic()
        pretrain(settings.replace(resume=(run / "config.yaml").is_file()))
        account = float(read_facts(run, "run.json").get("wall_time_seconds", 0.0))  # of an interrupted run also what was spent before
        seconds["pretrain"] = round(max(time.monotonic() - began, account), 2)
    return scaled


def device_name(device: str) -> str:
    """The device as tables name it."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"


def task_config(cell: Cell, config: StudyConfig, out: Path, run: Path, task: str, device: str, weights: str | None) -> Any:
    """The configuration of a task of a cell."""
    kind, data = arm(cell.arm), config.data[cell.data]
    more: dict[str, Any] = {"data": str(out / "folds" / cell.data / f"{cell.fold}.csv"), "out": str(cell.folder(out) / task), "seed": cell.fold, "device": device,
                            "progress": False, "resume": True, "store_weights": config.keep == "all"}
    if kind.init == "pretrained":
        more["run"] = str(run)
    else:
        plain = config.pretrain_config(cell.data, images="images", out="out")
        more |= {"run": None, "encoder": plain.encoder, "image_size": plain.image_size,
                 "channels": plain.channels or _channels(out / "folds" / cell.data / f"{cell.fold}.pretrain.csv", ReadSettings(**data.read)),
                 "intensity": data.read.get("intensity", plain.intensity), "aspect": data.read.get("aspect", "pad"), "init": "scratch" if kind.init == "scratch" else weights}
    settings = config.finetune_config(task, **{**config.block_settings(task, cell.data, cell.arm), **more})
    if kind.longer and not settings.linear_probe:
        # As many images as pre-training has seen, on top; patience grows alike, so that early stopping does not undo it.
        extra = config.pretrain_config(cell.data, images="images", out="out").epochs
        settings = dataclasses.replace(settings, epochs=settings.epochs + extra, patience=settings.patience * (settings.epochs + extra) // settings.epochs)
    return settings


def _channels(images: Path, read: ReadSettings) -> int:
    """Channels of the first image that can be read of those that the other arms pre-train on, whose networks have as many."""
    for record in read_list(images, settings=read):
        try:
            return int(read_image(record, read).shape[0])
        except UnreadableImage:
            continue
    raise StudyError(f"study: {images.name} must list at least one image that can be read, got none. Look at the files.")


def _tidy(run: Path, keep: str) -> None:
    """Remove what the study does not keep of a finished cell."""
    if keep == "all" or not run.is_dir():
        return
    for path in run.iterdir():
        heavy = path.name.startswith("checkpoint") or path.is_dir() or (path.suffix == ".safetensors" and (keep == "results" or path.name != "encoder.safetensors"))
        if heavy:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
