"""What happens to finished tasks when their settings change: their results are set aside, those of other tasks stay, and what is set aside comes back with its settings."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mwm.study.cell_files import CELL, PROGRESS, Cell, has_results, locked, read_facts, same_cell, settings_of_task, write_facts
from mwm.study.config import StudyConfig
from mwm.transfer.tasks import state_file

STALE = "stale"
"""Folder of a cell with results of other settings, TASK-HASH each."""


def cells_there(config: StudyConfig, out: Path) -> Iterator[Cell]:
    """The cells of a study that have a folder, with all tasks that the study gives them."""
    for data, name, tasks in config.cells():
        for folder in sorted((out / "cells" / data / name).glob("*")):
            if folder.is_dir() and folder.name.isdigit():
                yield Cell(data, name, int(folder.name), tasks)


def split_hashes(before: StudyConfig, out: Path) -> None:
    """Note in the cells of a study whose settings of tasks are about to change what each task was run with.

    A cell of before this was kept knows one hash of everything; with the study's file of then it is told apart.

    Args:
        before: the study as it was until now.
        out: its folder.
    """
    for cell in cells_there(before, out):
        for name in (CELL, PROGRESS):
            facts = read_facts(cell.folder(out), name)
            weights = facts.get("weights_hash")
            if not facts or "task_hashes" in facts or facts.get("config_hash") != before.fingerprint(cell.data, cell.arm, weights):
                continue
            hashes = {task: before.task_fingerprint(task) for task in cell.tasks if name == PROGRESS or has_results(cell.folder(out), task)}
            _update(cell.folder(out), name, {"base_hash": before.base_fingerprint(cell.data, cell.arm, weights), "task_hashes": hashes})


def set_aside(config: StudyConfig, out: Path) -> dict[str, list[str]]:
    """Set results of tasks aside whose settings are others now, and bring those back that have the settings of now.

    Args:
        config: the study as it is now.
        out: its folder.

    Returns:
        Task -> names of the cells whose results of it were set aside.
    """
    moved: dict[str, list[str]] = {}
    for cell in cells_there(config, out):
        folder = cell.folder(out)
        for task in cell.tasks:
            held, now = _held(cell, config, out, task), config.task_fingerprint(task, cell.data, cell.arm)
            kept = folder / STALE / f"{task}-{now}"
            if held in (None, now) and not (kept.is_dir() and not has_results(folder, task)):
                continue
            with locked(out / "locks" / cell.name.replace("/", "-")):  # a cell in flight ends first
                if (held := _held(cell, config, out, task)) not in (None, now):
                    state_file(folder / task).unlink(missing_ok=True)
                    if (folder / task).is_dir():
                        _move(folder / task, folder / STALE / f"{task}-{held}")
                        moved.setdefault(task, []).append(cell.name)
                    for name in (CELL, PROGRESS):
                        _forget(folder, name, task)
                if kept.is_dir() and not has_results(folder, task):
                    _move(kept, folder / task)
                    facts = read_facts(folder)
                    _update(folder, CELL, {"task_hashes": {**facts.get("task_hashes", {}), task: now},
                                           **({"tasks": sorted({*facts["tasks"], task})} if "tasks" in facts else {})})
    return moved


def _held(cell: Cell, config: StudyConfig, out: Path, task: str) -> str | None:
    """Hash of the settings that a task of a cell was run with; None where there is nothing of it, or the cell is one of other settings altogether."""
    folder = cell.folder(out)
    facts = {**read_facts(folder), **read_facts(folder, PROGRESS)}
    if not same_cell(facts, cell, config, facts.get("weights_hash")) or not (has_results(folder, task) or state_file(folder / task).is_file()):
        return None
    return settings_of_task(facts, cell, config, task)


def _move(source: Path, target: Path) -> None:
    """Rename a folder; what is in its place has the same settings and goes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    source.rename(target)


def _forget(folder: Path, name: str, task: str) -> None:
    """Take the hash of a task out of cell.json or progress.json."""
    facts = read_facts(folder, name)
    if task in (facts.get("task_hashes") or {}):
        _update(folder, name, {"task_hashes": {one: hashed for one, hashed in facts["task_hashes"].items() if one != task}})


def _update(folder: Path, name: str, more: dict[str, Any]) -> None:
    """Write some facts of a cell anew, where it has the file; progress.json outlives a change of cell.json."""
    if facts := read_facts(folder, name):
        write_facts(folder, facts | more, name, keep_progress=True)
