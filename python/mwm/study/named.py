"""When a study named what it runs: arms and tasks that came to the configuration after results of their data set were there are marked in the tables.

Kept in OUT/named.json: DATA/ARM/TASK -> how many results (cells times tasks) of the data set were there when the configuration first named it.
"""

from __future__ import annotations

import json
from pathlib import Path

from mwm.study.cell_files import read_facts
from mwm.study.config import TASKS, StudyConfig
from mwm.train.checkpoint import write_text

STORED = "named.json"


def record_named(config: StudyConfig, out: Path) -> None:
    """Add what the configuration names for the first time, with the number of results that its data set has now."""
    known, wanted = named(out), _keys(config)
    added = {key: count_results(out, key.split("/")[0]) for key in wanted if key not in known}
    if added or not (out / STORED).is_file():
        write_text(out / STORED, json.dumps(known | added, indent=1) + "\n")


def named(out: Path) -> dict[str, int]:
    """What is known; of a study from before this was written down, what its configuration names counts as named in time.

    Raises:
        ValueError: the file holds something else.
    """
    if (out / STORED).is_file():
        found = read_facts(out, STORED)
        if not all(isinstance(key, str) and key.count("/") == 2 and type(value) is int and value >= 0 for key, value in found.items()):
            raise ValueError(f"study: {STORED} must hold a whole number by DATA/ARM/TASK, got something else. Restore it.")
        return found
    return dict.fromkeys(_keys(StudyConfig.from_yaml(out / "study.yaml")), 0) if (out / "study.yaml").is_file() else {}


def late(out: Path) -> dict[tuple[str, str, str], int]:
    """(data set, arm, task) that were named after results of the data set were there -> how many results."""
    return {tuple(key.split("/")): count for key, count in named(out).items() if count}  # type: ignore[misc]


def merge_named(packed: Path, out: Path) -> None:
    """Into a study that takes the cells of an archive: what the archive named keeps its count; what is new comes after the archive's results."""
    theirs, ours = named(packed), named(out)
    merged = {key: max(count, theirs.get(key, count_results(packed, key.split("/")[0]))) for key, count in ours.items()}
    write_text(out / STORED, json.dumps({key: count for key, count in theirs.items() if key not in ours} | merged, indent=1) + "\n")


def count_results(out: Path, data: str) -> int:
    """Cells times tasks of a data set that have results."""
    return sum((folder / task / "metrics.json").is_file() for folder in (out / "cells" / data).glob("*/*") for task in TASKS)


def _keys(config: StudyConfig) -> list[str]:
    return [f"{data}/{arm}/{task}" for data, arm, tasks in config.cells() for task in tasks]
