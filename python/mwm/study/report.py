"""The report of a study: results.csv, arms.csv, contrasts.csv, regions.csv, masks.csv, tables.md and the plots, from whatever cells are finished."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mwm import view
from mwm.data.csv_cells import file_cell, text_cell
from mwm.study.analysis import Plan, differences, figures
from mwm.study.collect import Collected, collect, write_answers, write_rows
from mwm.study.config import StudyConfig
from mwm.study.endpoints import Answers
from mwm.study.mask_facts import mask_facts
from mwm.study.named import late
from mwm.study.plots import plots
from mwm.study.region_facts import region_facts
from mwm.study.shortcut import shortcut, write_shortcut
from mwm.study.statistics import ROUNDS
from mwm.study.tables import as_rows, tables
from mwm.train.checkpoint import write_text


def report(config: StudyConfig, out: str | Path, *, target: str | Path | None = None, rounds: int = ROUNDS, draw: bool = True) -> Path:
    """Write the report of a study.

    No file in it names an image or a patient, except those below `local/`.

    Args:
        config: Of the study; its section `analysis` says what is primary.
        out: Folder of the study.
        target: Folder of the report; OUT/report where left out.
        rounds: Bootstrap draws.
        draw: As in `mask_facts`.

    Returns:
        The folder.

    Raises:
        StudyError: no cell is finished, or cells do not fit together.
    """
    root, folder = Path(out), Path(target) if target else Path(out) / "report"
    plan, found = Plan.from_dict(config.analysis), collect(root)
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(found.rows, folder / "results.csv")
    write_answers(found, folder / "local")
    shortcuts = {data: shortcut_answers(root, data, found) for data in found.folds if needs_shortcut(found, data)}
    arms = figures(found, plan, shortcuts=shortcuts, rounds=rounds)
    contrasts = differences(found, plan, rounds=rounds)
    regions, masks = region_facts(root), mask_facts(root, draw=draw)
    for name, rows in zip(("arms.csv", "contrasts.csv", "regions.csv", "masks.csv"), (*as_rows(arms, contrasts), regions, masks), strict=True):
        _write(folder / name, rows)
    write_text(folder / "tables.md", tables(found, arms, contrasts, regions=regions, masks=masks, late=late(root), unfinished=unfinished(config, found)))
    for name, chart in plots(found, plan, arms, contrasts).items():
        view.save(chart.image(), folder / f"{name}.png")
    return folder


def unfinished(config: StudyConfig, found: Collected) -> list[str]:
    """Planned cells that neither finished all of their tasks nor failed: DATA/ARM/FOLD, or DATA/ARM where the folds were not made yet.

    A cell that has results of some tasks is DATA/ARM (TASKS)/FOLD with those that are missing.
    """
    done: dict[tuple[str, str, int], set[str]] = {}
    for row in found.rows:
        if row["status"] == "done":
            done.setdefault((row["data_set"], row["arm"], row["fold"]), set()).add(row["task"])
    failed = {(data, arm, int(seed)) for data, arm, seed, _ in found.failed}
    names = []
    for data, arm, tasks in config.cells():
        folds = len(found.folds[data].test) if data in found.folds else config.data[data].folds
        if not isinstance(folds, int):
            names.append(f"{data}/{arm}")
        for fold in range(folds) if isinstance(folds, int) else ():
            held = done.get((data, arm, fold), set())
            missing = [task for task in tasks if task not in held]
            if missing and (data, arm, fold) not in failed:
                names.append("/".join((data, arm + (f" ({', '.join(missing)})" if len(missing) < len(tasks) else ""), str(fold))))
    return names


def needs_shortcut(found: Collected, data: str) -> bool:
    """Whether a data set was classified, so that its tables have a shortcut row."""
    return any(key[0] == data and key[3] == "" for key in found.answers)


def shortcut_answers(root: Path, data: str, found: Collected) -> Answers:
    """Answers of the shortcut classifier, kept in OUT/shortcut because they depend on the folds alone."""
    path = root / "shortcut" / f"{data}.csv"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shortcut(shortcut([root / "folds" / data / f"{fold}.csv" for fold in sorted(found.folds[data].test)]), path)
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        classes = [column[2:] for column in reader.fieldnames or () if column.startswith("p_")]
        rows = list(reader)
    fold, labels = [int(row["fold"]) for row in rows], [text_cell(name) for name in classes]
    names = {k: {file_cell(name): name for name in held} for k, held in found.folds[data].test.items()}
    files = tuple(names[k][row["file"]] for k, row in zip(fold, rows, strict=True))
    return Answers(files, np.array(fold), tuple(found.folds[data].test[k][file] for k, file in zip(fold, files, strict=True)),
                   np.array([labels.index(row["label"]) for row in rows]), np.array([[float(row[f"p_{name}"]) for name in classes] for row in rows]))


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    buffer = io.StringIO()
    if rows:
        writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows)
    write_text(path, buffer.getvalue())
