"""Settings of tasks and the results that are there: a task that comes later brings its own, one that has results keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mwm.study.analysis import Plan
from mwm.study.cell_files import CELL, PROGRESS, Cell, has_results, read_facts, same_cell, settings_of_task, write_facts
from mwm.study.config import StudyConfig
from mwm.study.errors import StudyError
from mwm.transfer.tasks import state_file


def cells_there(config: StudyConfig, out: Path) -> Iterator[Cell]:
    """The cells of a study that have a folder, with all tasks that the study gives them."""
    for data, name, tasks in config.cells():
        for folder in sorted((out / "cells" / data / name).glob("*")):
            if folder.is_dir() and folder.name.isdigit():
                yield Cell(data, name, int(folder.name), tasks)


def split_hashes(before: StudyConfig, out: Path) -> None:
    """Note in the cells of a study that gets settings of more tasks what each of its tasks was run with.

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


def refuse_changed(config: StudyConfig, out: Path) -> None:
    """Refuse settings of a task that are not those of results that are there, and another plan of what is primary: changed after a look at results, they are another study.

    Args:
        config: the study as it is now.
        out: its folder.

    Raises:
        StudyError: a task of a cell has results, or has been begun, with other settings; or what is primary, descriptive, or of interest was another before them.
    """
    _refuse_other_plan(config, out)
    for cell in cells_there(config, out):
        for task in cell.tasks:
            if _held(cell, config, out, task) not in (None, config.task_fingerprint(task, cell.data, cell.arm)):
                raise StudyError(f"study: {task} of {cell.name} must have been run with the settings of now, got results of others. Choose another --out, or restore its settings.")


def _refuse_other_plan(config: StudyConfig, out: Path) -> None:
    """Refuse another primary contrast, endpoint or effect of interest than the study began with, once a data set has results."""
    stored = out / "study.yaml"
    if not stored.is_file():
        return
    seen = sorted({path.parts[-5] for path in out.glob("cells/*/*/*/*/metrics.json")})
    before, now = (Plan.from_dict(one.analysis) for one in (StudyConfig.from_yaml(stored), config))
    for data in seen:
        then, wanted = ((plan.primary, plan.primary_endpoints.get(data), dict(plan.effects), data in plan.descriptive) for plan in (before, now))
        if then != wanted:
            raise StudyError(f"study: primary contrast, primary endpoint, effects and descriptive data sets must stay as they were before the first result, got others for {data}. "
                             "Restore the section analysis; another question is a further pair of its contrasts, or another study with another --out.")


def _held(cell: Cell, config: StudyConfig, out: Path, task: str) -> str | None:
    """Hash of the settings that a task of a cell was run with; None where there is nothing of it, or the cell is one of other settings altogether."""
    folder = cell.folder(out)
    facts = {**read_facts(folder), **read_facts(folder, PROGRESS)}
    if not same_cell(facts, cell, config, facts.get("weights_hash")) or not (has_results(folder, task) or state_file(folder / task).is_file()):
        return None
    return settings_of_task(facts, cell, config, task)


def _update(folder: Path, name: str, more: dict[str, Any]) -> None:
    """Write some facts of a cell anew, where it has the file; progress.json outlives a change of cell.json."""
    if facts := read_facts(folder, name):
        write_facts(folder, facts | more, name, keep_progress=True)
