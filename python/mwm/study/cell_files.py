"""What a cell of a study leaves on the disk: cell.json, what is written down while it runs, and which of its tasks are finished."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mwm.study.config import StudyConfig
from mwm.study.errors import StudyError
from mwm.study.sources import arm
from mwm.train.checkpoint import write_text

CELL, PROGRESS = "cell.json", "progress.json"


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

    def open_tasks(self, out: Path) -> tuple[str, ...]:
        """Those of its tasks that have no results yet."""
        return tuple(task for task in self.tasks if not has_results(self.folder(out), task))


def has_results(folder: Path, task: str) -> bool:
    """Whether a task of a cell has come to its end."""
    return (folder / task / "metrics.json").is_file()


def read_facts(folder: Path, name: str = CELL) -> dict[str, Any]:
    """cell.json (or progress.json) of a cell, or {} where there is none."""
    try:
        facts = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def fingerprint(cell: Cell, config: StudyConfig, weights: str | None = None) -> str:
    """Hash of everything that decides a cell's numbers, the content of the file of ImageNet weights included where the arm starts from it."""
    return config.fingerprint(cell.data, cell.arm, weights_hash(weights) if weights and arm(cell.arm).init == "imagenet" else None)


def base_fingerprint(cell: Cell, config: StudyConfig, weights: str | None = None) -> str:
    """As `fingerprint`, without the settings of the tasks."""
    return config.base_fingerprint(cell.data, cell.arm, weights_hash(weights) if weights and arm(cell.arm).init == "imagenet" else None)


def task_hashes(cell: Cell, config: StudyConfig) -> dict[str, str]:
    """Hash of the settings of now of each of a cell's tasks."""
    return {task: config.task_fingerprint(task, cell.data, cell.arm) for task in cell.tasks}


def held_hashes(facts: dict[str, Any], cell: Cell, config: StudyConfig, out: Path) -> dict[str, str]:
    """Hash of the settings that each task with results was run with, by cell.json."""
    done = (path.parent.name for path in cell.folder(out).glob("*/metrics.json"))
    return {task: held for task in sorted(done) if (held := settings_of_task(facts, cell, config, task)) is not None}


def same_cell(facts: dict[str, Any], cell: Cell, config: StudyConfig, weights: str | None = None) -> bool:
    """Whether cell.json is of a cell of these settings, those of its tasks left out.

    Args:
        facts: what the file holds; a cell of before `base_hash` was written knows one hash of everything.
        cell: which.
        config: of the study.
        weights: hash of the file of ImageNet weights, where the arm starts from it.
    """
    return facts.get("config_hash") == config.fingerprint(cell.data, cell.arm, weights) or facts.get("base_hash") == config.base_fingerprint(cell.data, cell.arm, weights)


def settings_of_task(facts: dict[str, Any], cell: Cell, config: StudyConfig, task: str) -> str | None:
    """Hash of the settings that a task was run with, by cell.json; of a cell from before they were written, those that the study's file has for all blocks."""
    if "task_hashes" in facts:
        return facts["task_hashes"].get(task)
    return config.task_fingerprint(task)


def weights_hash(path: str | Path) -> str:
    """Hash of the content of a file of weights.

    Raises:
        StudyError: the file cannot be read.
    """
    try:
        facts = Path(path).stat()
        return _content_hash(str(path), facts.st_size, facts.st_mtime_ns)
    except OSError as error:
        raise StudyError(f"study: --weights must be a file of weights, got {path} ({error.strerror}). Check the path.") from error


@functools.lru_cache(maxsize=8)
def _content_hash(path: str, size: int, changed: int) -> str:
    digest = blake2b(digest_size=8)
    with open(path, "rb") as file:
        while part := file.read(2**22):
            digest.update(part)
    return digest.hexdigest()


def refuse_other_settings(cell: Cell, config: StudyConfig, out: Path, weights: str | None = None) -> None:
    """Refuse a cell that has results of other settings.

    Raises:
        StudyError: the study's file, the arm or the file of weights has changed since.
    """
    folder = cell.folder(out)
    facts = read_facts(folder) or read_facts(folder, PROGRESS)
    if "config_hash" not in facts or not any(folder.glob("*/metrics.json")):
        return
    if _same(facts, cell, config, weights):
        now = task_hashes(cell, config)
        other = [task for task, held in held_hashes(facts, cell, config, out).items() if now.get(task, held) != held]
        if other:
            raise StudyError(f"study: {other[0]} of {cell.name} must have been run with the settings of now, got results of others. Choose another --out, or restore its settings.")
        return
    if weights and facts.get("weights_hash") not in (None, weights_hash(weights)):
        raise StudyError(f"study: --weights must be the file that {cell.name} was run with, got another content ({weights_hash(weights)} instead of {facts['weights_hash']}). "
                         "Give the file of then, or remove the cells of the arm to run them all again.")
    raise StudyError(f"study: {cell.name} must have been run with the settings of now, got results of others (the study's file or the arm has changed since). "
                     "Remove the cell to run it again.")


def finished(cell: Cell, out: Path, config: StudyConfig, weights: str | None = None) -> bool:
    """Whether all tasks of a cell have their results under these settings; a task that failed later does not undo them."""
    facts = read_facts(cell.folder(out))
    ended = facts.get("status") == "done" or (facts.get("status") == "failed" and set(cell.tasks) <= set(facts.get("tasks") or ()))
    return (ended and not cell.open_tasks(out) and _same(facts, cell, config, weights)
            and all(settings_of_task(facts, cell, config, task) == now for task, now in task_hashes(cell, config).items()))


def _same(facts: dict[str, Any], cell: Cell, config: StudyConfig, weights: str | None) -> bool:
    """`same_cell`, with the file of ImageNet weights itself."""
    return same_cell(facts, cell, config, weights_hash(weights) if weights and arm(cell.arm).init == "imagenet" else None)


def exported(run: Path) -> bool:
    """Whether a pre-training has come to its end and its encoder is still there."""
    return read_facts(run, "run.json").get("status") == "finished" and (run / "encoder.safetensors").is_file()


def pretrains_again(cell: Cell, out: Path, config: StudyConfig, weights: str | None = None) -> float | None:
    """Seconds that the first pre-training of a cell took, where open tasks need it once more because its encoder was not kept; None where they do not.

    0 where the time is not known.
    """
    folder = cell.folder(out)
    facts = read_facts(folder)
    if not arm(cell.arm).pretrain or not any(folder.glob("*/metrics.json")) or not cell.open_tasks(out) or exported(folder / "run"):
        return None
    if not _same(facts, cell, config, weights):
        return None
    return float((facts.get("wall_seconds") or {}).get("pretrain", 0.0))


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


def write_facts(folder: Path, facts: dict[str, Any], name: str = CELL, *, keep_progress: bool = False) -> None:
    """cell.json, or progress.json while the cell runs: tables look at the first alone, and it takes the place of the second where that is not kept."""
    write_text(folder / name, json.dumps(facts, indent=1) + "\n")
    if name == CELL and not keep_progress:
        (folder / PROGRESS).unlink(missing_ok=True)


def write_failure(cell: Cell, config: StudyConfig, out: Path, error: str, weights: str | None = None) -> None:
    """Note in cell.json that a cell failed, and why; tasks that had come to their end before keep their results and count.

    Results of other settings do not count: that they are there is what the next call is to refuse again.
    """
    folder = cell.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    hashed, before, later = fingerprint(cell, config, weights), read_facts(folder), read_facts(folder, PROGRESS)
    now = {"data_set": cell.data, "arm": cell.arm, "seed": cell.fold, "fold": cell.fold, "status": "failed", "error": error}
    if "config_hash" in before and not _same(before, cell, config, weights):
        kept = ("config_hash", "base_hash", "task_hashes", "weights_hash")
        write_facts(folder, now | {name: before[name] for name in kept if name in before})
        return
    # What a piece of a cell says about itself is in one of the two; progress.json is the later one.
    known = before | (later if later and _same(later, cell, config, weights) else {})
    tasks = sorted(path.parent.name for path in folder.glob("*/metrics.json")) if known else []
    write_facts(folder, known | now | earlier_failures(before) | {"config_hash": hashed, "base_hash": base_fingerprint(cell, config, weights), "tasks": tasks})


def earlier_failures(facts: dict[str, Any]) -> dict[str, list[str]]:
    """`failed_before` of a cell that runs again, by its cell.json: a failure stays on record when a later call comes to an end; {} where there was none."""
    errors = [*(facts.get("failed_before") or ()), *([facts["error"]] if facts.get("status") == "failed" and facts.get("error") else ())]
    return {"failed_before": list(dict.fromkeys(errors))} if errors else {}


def measured(run: Path) -> dict[str, Any]:
    """Realised hidden share, steps, milliseconds per step, by the pre-training's own account of its time."""
    try:
        with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
            hidden = [float(row["hidden_share"]) for row in csv.DictReader(file)]
        account = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError):
        return {}
    if not hidden:
        return {}
    return {"hidden_share": round(sum(hidden) / len(hidden), 5), "steps": len(hidden), "step_ms": round(1e3 * account["wall_time_seconds"] / len(hidden), 2)}
