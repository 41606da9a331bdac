"""`mwm study`: folds, regions, cells, tables, in one command that can be killed at any moment and called again."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mwm.data import ReadSettings
from mwm.study.cell_files import Cell, finished, locked, pretrains_again, refuse_other_settings
from mwm.study.config import StudyConfig
from mwm.study.errors import StudyError
from mwm.study.folds import write_folds
from mwm.study.mask_facts import draw_ahead
from mwm.study.named import record_named
from mwm.study.rehearse import clock, rehearse
from mwm.study.runner import Outcome, jobs_of, run_jobs
from mwm.study.same_time import needed, waiting
from mwm.study.sources import arm
from mwm.study.tables import mask_table
from mwm.study.task_settings import refuse_changed, split_hashes
from mwm.train import PretrainConfig
from mwm.train.checkpoint import write_text
from mwm.train.distributed import pick_device
from mwm.transfer.coco_metrics import pycocotools


@dataclass(frozen=True)
class StudyOptions:
    """How a study is run; none of this changes a number.

    Attributes:
        out: its folder.
        root: what the data sets' paths start from.
        device: "auto", "cpu", "cuda" or "cuda:N".
        workers: cells at a time; None for one per device, or per two CPU threads.
        threads: CPU threads of each worker; None shares them out.
        budget: seconds after which no cell is begun; None for no limit.
        dry_run: time 20 steps of every kind of cell and print the total, and run nothing.
        masks: make the regions, draw the masks of every arm, print what they would hide of the true regions, and train nothing.
        weights: file of ImageNet weights.
        only: run cells whose name (DATA/ARM/FOLD) contains this.
    """

    out: str
    root: str = "."
    device: str = "auto"
    workers: int | None = None
    threads: int | None = None
    budget: float | None = None
    dry_run: bool = False
    masks: bool = False
    weights: str | None = None
    only: str = ""


def study(config: StudyConfig, options: StudyOptions) -> Outcome:
    """Run what is not done yet, and write the tables of what is.

    Under torchrun each process takes its share of the cells, and writes the tables when it ends, so that the last one's hold everything.

    Args:
        config: what the study is.
        options: how it is run.

    Returns:
        What became of the jobs of this call.

    Raises:
        StudyError: the study cannot start, or the folder belongs to another one.
        DataError: a data set is not there.
        ImportError: there is detection to do and pycocotools is not installed; the message says how to install it.
    """
    began, out = time.monotonic(), Path(options.out).expanduser()
    device, workers, threads = _resources(options)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    _claim(config, out, write=not options.dry_run)
    planned = _cells(config, out, Path(options.root), options.only)
    cells = [cell for cell in planned if options.only in cell.name]
    if not cells:
        raise StudyError(f"study: --only must match a cell DATA/ARM/FOLD, got {options.only!r}.")
    for cell in cells:
        if arm(cell.arm).init == "imagenet":
            if options.weights is None:
                raise StudyError("study: the arm imagenet must have a file of weights, got none. Add --weights FILE, or leave the arm out.")
            refuse_other_settings(cell, config, out, options.weights)
    todo = [not finished(cell, out, config, options.weights) for cell in cells]
    open_cells = [cell for cell, open_ in zip(cells, todo, strict=True) if open_]
    if any("detect" in cell.tasks for cell in open_cells):
        pycocotools()  # missed now rather than after the other tasks
    _say_again(open_cells, config, out, options.weights)
    if (options.masks or options.dry_run) and rank:  # one process says it for all
        return Outcome(left=[cell.name for cell in cells])
    if options.masks:
        facts = draw_ahead(cells, config, out, device)
        for data in dict.fromkeys(row["data_set"] for row in facts):
            print(f"\n{data}\n\n{mask_table(list(dict.fromkeys(cell.arm for cell in cells)), [row for row in facts if row['data_set'] == data])}")
        return Outcome(left=[cell.name for cell in cells])
    if options.dry_run:
        with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=out) as scratch:
            print(rehearse(config, cells, out, Path(scratch), device=device, workers=workers, threads=threads, weights=options.weights))
        return Outcome(left=[cell.name for cell in cells])
    # Shares are those of all cells: another process may have finished some of them before this one looks.
    mine = [cell for cell, open_ in list(zip(cells, todo, strict=True))[rank::world] if open_]
    later = waiting(mine, out, {cell.name for cell in mine}, {cell.name for cell in planned})
    for cell in later:
        print(f"study: {cell.name} waits until {' and '.join(one.arm for one in needed(cell))} of its fold are pre-trained, whose step times it needs; it runs in a later call.")
    mine = [cell for cell in mine if cell not in later]
    names = {cell.name for cell in cells}
    print(f"study: {len(names)} cells, {len(names - {cell.name for cell in open_cells})} of them done; {len({cell.name for cell in mine})} to run"
          f"{f' by process {rank} of {world}' if world > 1 else ''}, {workers} at a time on {device}", flush=True)
    until = None if options.budget is None else began + options.budget
    outcome = run_jobs(jobs_of(mine, config), config, out, device=device, workers=workers, threads=threads, weights=options.weights, until=until,
                       say=lambda line: print(f"[{time.monotonic() - began:.0f} s] {line}", flush=True))
    if outcome.left:
        print(f"study: the time is over; {len(outcome.left)} jobs are left, the same command goes on with them.")
    outcome.left += [cell.name for cell in later]
    for name, error in outcome.failed.items():
        print(f"study: {name} failed twice: {error}")
    if any((cell.folder(out) / "cell.json").is_file() for cell in cells):
        print(f"tables and plots in {write_report(config, out, draw=options.budget is None)}")  # time that is counted is for cells; --report draws masks again
    return outcome


def write_report(config: StudyConfig, out: Path, *, draw: bool = True) -> Path:
    """results.csv, tables and plots of what is done, in OUT/report.

    Args:
        config: of the study.
        out: its folder.
        draw: whether to draw masks again for the table of what they hid.

    Raises:
        StudyError: nothing is done, or the configuration has another plan or other settings than what is done.
    """
    from mwm.study.report import report

    refuse_changed(config, out)
    with locked(out / ".report.lock"):
        return report(config, out, draw=draw)


def folds_of(config: StudyConfig, out: Path, root: Path) -> dict[str, Path]:
    """The folder of the folds of every data set of a study, made where they are missing.

    Raises:
        StudyError: OUT belongs to another study, or a data set is not there.
        DataError: a data set cannot be read.
    """
    _claim(config, out)
    return {cell.data: out / "folds" / cell.data for cell in _cells(config, out, root, "")}


def _cells(config: StudyConfig, out: Path, root: Path, only: str) -> list[Cell]:
    """The cells of the data sets that `only` may mean, in order; makes their folds where they are missing."""
    counts = {}
    wanted = [(data, name) for data, name, _ in config.cells() if any(only in f"{data}/{name}/{fold}" for fold in range(_most_folds(config.data[data].folds)))]
    with locked(out / "folds" / ".lock"):
        for name in dict.fromkeys(data for data, _ in wanted):
            data = config.data[name]
            read = ReadSettings.from_dict({"intensity": config.pretrain.get("intensity", PretrainConfig.intensity), **data.read})
            folds = write_folds(root / data.index, out, name=name, folds=data.folds, labels=data.labels, subset=data.subset, seed=0, read=read)
            counts[name] = len(folds.paths)
            if not folds.patients_known:
                print(f"study: {name} has rows without a patient; each such image counts as a patient of its own, so that images of one may be in training and test. "
                      "Fill the column patient of the index.", flush=True)
    return [Cell(data, name, fold, tasks) for data, name, tasks in config.pieces() if data in counts for fold in range(counts[data])]


def _say_again(cells: Sequence[Cell], config: StudyConfig, out: Path, weights: str | None) -> None:
    """Say which cells pre-train once more for tasks that were added after their encoder had gone."""
    found = {cell: seconds for cell in cells if (seconds := pretrains_again(cell, out, config, weights)) is not None}
    if not found:
        return
    names, tasks = list(dict.fromkeys(cell.name for cell in found)), dict.fromkeys(task for cell in found for task in cell.open_tasks(out))
    total = sum({cell.name: seconds for cell, seconds in found.items()}.values())
    print(f"study: {len(names)} cells were finished without keeping their encoder (keep: results) and pre-train again for {', '.join(tasks)}: {', '.join(names[:4])}"
          f"{' …' if len(names) > 4 else ''}{f'; the first time that took {clock(total)} in all' if total else ''}. keep: encoder keeps it.", flush=True)


def _most_folds(folds: int | str) -> int:
    """How many folds a data set may have before its patients are counted."""
    return folds if isinstance(folds, int) else 5


def _claim(config: StudyConfig, out: Path, *, write: bool = True) -> None:
    """Write study.yaml, or refuse a folder whose study has other numbers; blocks, tables and what is kept may change, and settings of tasks without results.

    Without `write` (a rehearsal) settings stay free until the study begins.
    """
    import yaml

    out.mkdir(parents=True, exist_ok=True)
    path = out / "study.yaml"
    with locked(out / ".claim.lock"):
        if path.exists():
            before = StudyConfig.from_yaml(path)
            for name in ("pretrain", "source"):
                if getattr(before, name) != getattr(config, name):
                    raise StudyError(f"study: {out.name} belongs to a study with other settings in {name}. Choose another --out, or restore them.")
            for name in set(before.data) & set(config.data):
                if before.data[name] != config.data[name]:
                    raise StudyError(f"study: {out.name} belongs to a study that reads {name} otherwise. Choose another --out, or restore its settings.")
            if before.finetune != config.finetune:
                split_hashes(before, out)
            refuse_changed(config, out)
        if write:
            record_named(config, out)
            write_text(path, yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))


def _resources(options: StudyOptions) -> tuple[str, int, int]:
    """Device, workers and CPU threads of each."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = options.device
    if device == "auto":
        device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and int(os.environ.get("WORLD_SIZE", 1)) > 1:  # as in pre-training: each process on its own GPU
        device = f"cuda:{local}"
    try:
        kind = pick_device(device, "study").type
    except ValueError as error:
        raise StudyError(str(error)) from error
    for name in ("workers", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise StudyError(f"study: {name} must be at least 1, got {value}.")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpus = max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    workers = options.workers or (1 if kind == "cuda" else max(1, cpus // 2))
    return device, workers, options.threads or max(1, cpus // workers)

