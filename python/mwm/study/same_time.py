"""Arms that pre-train as long as another one instead of on as many images: from the step times that finished cells measured, the number of epochs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mwm.study.cell_files import Cell, read_facts
from mwm.study.errors import StudyError
from mwm.study.sources import arm
from mwm.train.config import read_yaml


def needed(cell: Cell) -> tuple[Cell, ...]:
    """The cells of the same fold whose step times a cell rests on; none for most arms."""
    return tuple(Cell(cell.data, name, cell.fold, ()) for name in arm(cell.arm).time_of or ())


def measured_cells(cell: Cell, out: Path) -> bool:
    """Whether the step times that a cell rests on are there."""
    return all(_step_ms(read_facts(one.folder(out))) for one in needed(cell))


def scaled_epochs(cell: Cell, out: Path, epochs: int) -> dict[str, Any]:
    """Epochs of an arm that takes as long as another one.

    `epochs * step_ms(A) / step_ms(B)`, rounded, at least 1: A is the arm whose time is taken, B one with the masks of this arm; both of the same fold. An interrupted run
    keeps the number that it began with.

    Args:
        cell: of the arm.
        out: folder of the study.
        epochs: of the other arms.

    Returns:
        `epochs`, and under `time_of` the arms and their milliseconds per step, for cell.json.

    Raises:
        StudyError: a cell has no step time yet, or the two were measured on different devices.
    """
    first, second = needed(cell)
    facts = [read_facts(one.folder(out)) for one in (first, second)]
    for one, held in zip((first, second), facts, strict=True):
        if not _step_ms(held):
            raise StudyError(f"study: {cell.name} takes as long as {first.arm}, so that {one.name} must have been pre-trained before, got no step time of it. "
                             f"Run it first (--only {one.name}).")
    devices = [held.get("device") for held in facts]
    if devices[0] != devices[1]:
        raise StudyError(f"study: {cell.name} compares the step times of {first.name} and {second.name}, which must be of one device, got {devices[0]} and {devices[1]}. "
                         "Run both again on one device.")
    begun = cell.folder(out) / "run" / "config.yaml"
    scaled = int(read_yaml(begun)["epochs"]) if begun.is_file() else max(1, round(epochs * _step_ms(facts[0]) / _step_ms(facts[1])))
    return {"epochs": scaled, "time_of": {first.arm: _step_ms(facts[0]), second.arm: _step_ms(facts[1])}}


def waiting(cells: Iterable[Cell], out: Path, run_now: Iterable[str], planned: Iterable[str]) -> list[Cell]:
    """Cells whose step times neither are there nor come from a cell that runs in this call.

    Args:
        cells: to look at.
        out: folder of the study.
        run_now: names of the cells that run in this call.
        planned: names of all cells of the study.

    Raises:
        StudyError: the study does not plan a cell that one of them needs.
    """
    run_now, planned, held = set(run_now), set(planned), []
    for cell in cells:
        missing = [one for one in needed(cell) if not _step_ms(read_facts(one.folder(out)))]
        for one in missing:
            if one.name not in planned:
                raise StudyError(f"study: {cell.arm} takes as long as {needed(cell)[0].arm}, so that the study must have the arm {one.arm} on {cell.data}, got none. "
                                 "Add it to a block before.")
        if any(one.name not in run_now for one in missing):
            held.append(cell)
    return held


def _step_ms(facts: dict[str, Any]) -> float:
    return float(facts.get("step_ms") or 0.0)
