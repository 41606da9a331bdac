"""A cell of a study: one arm on one fold of one data set, from regions to the results of every task, in steps that each survive a kill."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mwm.data import ReadSettings
from mwm.study.config import StudyConfig
from mwm.study.errors import StudyError
from mwm.study.sources import arm, region_fields
from mwm.train import pretrain
from mwm.train.checkpoint import write_text
from mwm.train.record import commit
from mwm.transfer import finetune


@dataclass(frozen=True)
class Cell:
    """Which cell.

    Attributes:
        data: name of the data set.
        arm: name of the arm.
        fold: number of the fold, which is also the seed.
        tasks: in the order in which they are run.
    """

    data: str
    arm: str
    fold: int
    tasks: tuple[str, ...]

    @property
    def name(self) -> str:
        """DATA/ARM/FOLD"""
        return f"{self.data}/{self.arm}/{self.fold}"

    def folder(self, out: Path) -> Path:
        """Where its results lie."""
        return out / "cells" / self.data / self.arm / str(self.fold)


def read_facts(folder: Path) -> dict[str, Any]:
    """cell.json of a cell, or {} where there is none."""
    try:
        facts = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def finished(cell: Cell, out: Path, config: StudyConfig) -> bool:
    """Whether all tasks of a cell have their results under these settings."""
    facts, folder = read_facts(cell.folder(out)), cell.folder(out)
    return (facts.get("status") == "done" and facts.get("config_hash") == config.fingerprint(cell.data, cell.arm)
            and all((folder / task / "metrics.json").is_file() for task in cell.tasks))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; the system lets go of it when a process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


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
    hashed = config.fingerprint(cell.data, cell.arm)
    if read_facts(cell.folder(out)).get("config_hash", hashed) != hashed and any(cell.folder(out).glob("*/metrics.json")):
        raise StudyError(f"study: {cell.name} must have been run with the settings of now, got results of others (the study's file or the arm has changed since). "
                         "Remove the cell to run it again.")
    folder, kind, seconds = cell.folder(out), arm(cell.arm), dict(read_facts(cell.folder(out)).get("wall_seconds", {}))
    folder.mkdir(parents=True, exist_ok=True)
    run = folder / "run"
    if kind.pretrain and not all((folder / task / "metrics.json").is_file() for task in cell.tasks):
        fields = make_regions(config, out, cell.data, cell.arm, cell.fold, device)
        settings = config.pretrain_config(cell.data, images=str(out / "folds" / cell.data / f"{cell.fold}.pretrain.csv"), out=str(run), seed=cell.fold, device=device,
                                          progress=False, panel_every=0, **fields)
        if not _exported(run):
            began = time.monotonic()
            pretrain(settings.replace(resume=(run / "config.yaml").is_file()))
            seconds["pretrain"] = round(time.monotonic() - began, 2)
    for task in cell.tasks:
        if (folder / task / "metrics.json").is_file():
            continue
        began = time.monotonic()
        finetune(task_config(cell, config, out, run, task, device, weights))
        seconds[task] = round(time.monotonic() - began, 2)
    source = config.source_of(cell.data)
    facts = {"data_set": cell.data, "arm": cell.arm, "seed": cell.fold, "fold": cell.fold, "status": "done", "error": None, "says": kind.says, "regions": kind.label(source),
             "uses_labels": kind.uses_labels(source), "supervised_region_source": kind.supervised(source), "wall_seconds": seconds,
             "config_hash": hashed, "device": device_name(device), "commit": commit(), **_measured(run)}
    write_text(folder / "cell.json", json.dumps(facts, indent=1) + "\n")
    _tidy(folder, run, config.keep)
    return facts


def write_failure(cell: Cell, config: StudyConfig, out: Path, error: str) -> None:
    """Note in cell.json that a cell failed, and why."""
    folder = cell.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"data_set": cell.data, "arm": cell.arm, "seed": cell.fold, "fold": cell.fold, "status": "failed", "error": error,
             "config_hash": read_facts(folder).get("config_hash", config.fingerprint(cell.data, cell.arm))}
    write_text(folder / "cell.json", json.dumps(facts, indent=1) + "\n")


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
        more |= {"run": None, "encoder": plain.encoder, "image_size": plain.image_size, "channels": plain.channels,
                 "intensity": data.read.get("intensity", plain.intensity), "aspect": data.read.get("aspect", "pad"), "init": "scratch" if kind.init == "scratch" else weights}
    settings = config.finetune_config(task, **more)
    if kind.longer and not settings.linear_probe:
        # As many images as pre-training has seen, on top; patience grows alike, so that early stopping does not undo it.
        extra = config.pretrain_config(cell.data, images="images", out="out").epochs
        settings = dataclasses.replace(settings, epochs=settings.epochs + extra, patience=settings.patience * (settings.epochs + extra) // settings.epochs)
    return settings


def _exported(run: Path) -> bool:
    """Whether a pre-training has come to its end."""
    try:
        return json.loads((run / "run.json").read_text(encoding="utf-8")).get("status") == "finished" and (run / "encoder.safetensors").is_file()
    except (OSError, ValueError):
        return False


def _measured(run: Path) -> dict[str, Any]:
    """Realised hidden share, milliseconds per step, and the pre-training's own account of its time."""
    try:
        with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
            hidden = [float(row["hidden_share"]) for row in csv.DictReader(file)]
        account = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError):
        return {}
    if not hidden:
        return {}
    return {"hidden_share": round(sum(hidden) / len(hidden), 5), "steps": len(hidden), "step_ms": round(1e3 * account["wall_time_seconds"] / len(hidden), 2)}


def _tidy(folder: Path, run: Path, keep: str) -> None:
    """Remove what the study does not keep of a finished cell."""
    if keep == "all" or not run.is_dir():
        return
    for path in run.iterdir():
        heavy = path.name.startswith("checkpoint") or path.is_dir() or (path.suffix == ".safetensors" and (keep == "results" or path.name != "encoder.safetensors"))
        if heavy:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
