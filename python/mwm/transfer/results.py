"""What a task leaves behind: metrics.json, predictions.csv, confusion.png, history.csv and weights, written all or not at all."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import mwm
from mwm import view
from mwm.data import SkippedFiles
from mwm.data.csv_cells import file_cell, text_cell
from mwm.train.export import Encoder
from mwm.transfer.config import FinetuneConfig, TransferError
from mwm.transfer.labelled import SPLITS, Labelled
from mwm.transfer.metrics import METRICS, auroc, confusion
from mwm.transfer.stored import StoredModel, write_model, write_tensors


@dataclass(frozen=True)
class Outcome:
    """A fitted classifier's answers.

    Attributes:
        method: "fine-tuning", "linear probe" or "k-NN".
        probabilities: By split, [N, K] each.
        weights: Of the network, by its library's names; without a head where the head is among `extra`.
        history: One row per epoch or per setting that was tried.
        chosen: What the val split chose.
        extra: Further files of tensors that the answers need, by file name.
        facts: Further numbers that the answers need.
    """

    method: str
    probabilities: dict[str, NDArray]
    weights: dict[str, Tensor]
    history: list[dict[str, float]]
    chosen: dict[str, Any]
    extra: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def open_results(out: Path, *, overwrite: bool, command: str = "finetune") -> None:
    """Refuse a folder that would lose something, or in which nothing could be written once the work is done.

    Args:
        out: Where results shall be; a link stands for what it leads to.
        overwrite: Whether earlier results may be replaced.
        command: Of which command the messages speak.

    Raises:
        FileExistsError: it exists and is not empty, and `overwrite` is off, or it is no folder of results.
        TransferError: it cannot be replaced as a whole, or nothing can be written beside it.
    """
    place = out.resolve()
    if os.path.ismount(place) or Path.cwd().is_relative_to(place):
        raise TransferError(f"{command}: out must be a folder that can be replaced as a whole, got {out}, which is a mounted disk, or the folder that you are in. Name a "
                            "folder inside it.")
    above = next(folder for folder in place.parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise TransferError(f"{command}: out must lie in a folder that can be written, got {above} ({error.strerror}). Choose another.") from error
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{command}: out must be a new folder, got {out}, which exists. Choose another, or add --overwrite.")
    if not place.is_dir() or not (place / "metrics.json").is_file():
        raise FileExistsError(f"{command}: out must be a folder of earlier results to be overwritten, got {out}, which is not. Choose another.")


@contextlib.contextmanager
def new_results(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not."""
    out = out.resolve()  # a link stays, and leads to the new folder
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield temporary
        for path in (temporary, *temporary.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def base_report(config: FinetuneConfig, encoder: Encoder, data: Labelled, *, method: str, seconds: float, command: str | None) -> dict[str, Any]:
    """What metrics.json holds for every task. No file names and no patients."""
    return {
        "task": config.task, "method": method, "encoder": encoder.name, "classes": list(data.classes),
        "images": {split: len(data.of(split)) for split in SPLITS},
        "patients": {split: len({case.patient for case in data.of(split)}) for split in SPLITS} if data.patients_known else None,
        "notes": list(data.notes), "config": config.to_dict(), "command": command, "seconds": round(seconds, 1),
        "versions": {"mwm": mwm.__version__, "torch": torch.__version__, "python": sys.version.split()[0]},
    }


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    """history.csv: one row per epoch, or per setting that was tried."""
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)


def write_results(out: Path, config: FinetuneConfig, encoder: Encoder, data: Labelled, outcome: Outcome, figures: dict[str, Any], skipped: SkippedFiles, *,
                  seconds: float, command: str | None) -> None:
    """Write a classifier's results to a temporary folder beside `out`, then put it in place.

    metrics.json holds no file names and no patients; predictions.csv is local and holds relative file names.
    """
    with new_results(out) as temporary:
        test = data.of("test")
        counts = confusion(np.array([case.label for case in test]), outcome.probabilities["test"])
        report = base_report(config, encoder, data, method=outcome.method, seconds=seconds, command=command)
        report |= {**figures, "confusion_test": counts.tolist(), "chosen_on_val": outcome.chosen, "images": {split: _by_class(data, split) for split in SPLITS}}
        (temporary / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
        _write_predictions(temporary / "predictions.csv", data, outcome)
        write_history(temporary / "history.csv", outcome.history)
        truth, probabilities = np.array([case.label for case in test]), outcome.probabilities["test"]
        view.save(view.confusion_matrix(counts, data.classes, title=f"{outcome.method}, test: {len(test)} images"), temporary / "confusion.png")
        view.save(view.roc_chart(truth, probabilities, data.classes, notes=_areas(figures["test"], truth, probabilities)).image(), temporary / "roc.png")
        view.save(view.calibration_chart(truth, probabilities).image(), temporary / "calibration.png")
        stored = StoredModel(config.task, outcome.method, encoder.name, data.classes, encoder.preprocessing, outcome.facts)
        write_model(temporary, stored, outcome.weights if config.store_weights else None)
        for name, tensors in outcome.extra.items() if config.store_weights else ():
            write_tensors(temporary / name, tensors)
        skipped.write(temporary / "skipped.csv")


def _areas(figures: dict[str, Any], truth: NDArray, probabilities: NDArray) -> list[str]:
    """Legend of the ROC curves: the area under each, with its interval where there are two classes."""
    if probabilities.shape[1] == 2:
        area = figures["auroc"]
        return ["", "" if area["low"] is None else f"AUROC {area['value']:.3f} ({area['low']:.3f} to {area['high']:.3f})"]
    return [f"AUROC {auroc(truth == k, np.stack([1 - column, column], 1)):.3f}" for k, column in enumerate(probabilities.T)]


def _by_class(data: Labelled, split: str) -> dict[str, int]:
    counts = np.bincount([case.label for case in data.of(split)], minlength=len(data.classes))
    return {name: int(count) for name, count in zip(data.classes, counts, strict=True)}


def _write_predictions(path: Path, data: Labelled, outcome: Outcome) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "split", "label", "predicted", *(f"p_{name}" for name in data.classes)])
        for split in ("val", "test"):
            for case, row in zip(data.of(split), outcome.probabilities[split], strict=True):
                true, found = text_cell(data.classes[case.label]), text_cell(data.classes[int(row.argmax())])
                writer.writerow([file_cell(case.record.name), split, true, found, *(f"{p:.6f}" for p in row)])


def summary(figures: dict[str, Any]) -> str:
    """Test figures as a table of text."""
    basis = f"{figures['images']} images" + (f" of {figures['patients']} patients" if figures["patients"] is not None else "; patients not known")
    lines = [f"test ({basis})"]
    for name in METRICS:
        value = figures[name]
        shown = "not defined" if value["value"] is None else f"{value['value']:.3f}"
        if value["low"] is not None and value["value"] is not None:
            shown += f"   95 % interval {value['low']:.3f} to {value['high']:.3f}"
        lines.append(f"  {name.replace('_', ' '):18s} {shown}")
    return "\n".join(lines)
