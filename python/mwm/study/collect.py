"""Reads the finished cells of a study: one long CSV of what each cell measured, and the pooled out-of-fold answers of every arm.

A cell lies in OUT/cells/DATA_SET/ARM/SEED/: cell.json, run/ (config.yaml, run.json), and a folder per task with metrics.json and predictions. Which patient an image
belongs to, and which images a fold may be tested on, is read from OUT/folds/DATA_SET/.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mwm.data.csv_cells import file_cell, text_cell
from mwm.study.detections import Detections, read_detections
from mwm.study.endpoints import Answers
from mwm.study.errors import StudyError
from mwm.study.flops import dense_gflop
from mwm.study.index import read_index
from mwm.study.numbering import image_name
from mwm.study.sources import ARMS, MAIN
from mwm.study.sources import arm as arm_named
from mwm.train.checkpoint import write_text
from mwm.train.config import read_yaml

COLUMNS = ("data_set", "arm", "regions", "uses_labels", "supervised_region_source", "seed", "fold", "task", "endpoint", "value", "images", "patients", "hidden_share",
           "step_ms", "pretrain_seconds", "task_seconds", "encoder_gflop", "config_hash", "device", "commit", "status", "error")
_MASKS = ("dice", "iou", "nsd", "hd95")


@dataclass(frozen=True)
class FoldPatients:
    """Who is tested where in a data set.

    Attributes:
        test: Per fold: file -> patient (the image itself where the patient is not known).
        facts: folds.json.
    """

    test: dict[int, dict[str, str]]
    facts: dict[str, Any]

    @property
    def descriptive(self) -> bool:
        """Whether the data set has too few patients for inference."""
        return bool(self.facts.get("descriptive"))


@dataclass
class Collected:
    """What a study has so far.

    Attributes:
        rows: Of the long CSV, by `COLUMNS`.
        answers: (data set, arm, task, endpoint) -> pooled answers; for classification the endpoint is "" and every classification endpoint is in them.
        detections: (data set, arm) -> pooled detections.
        folds: By data set.
        failed: (data set, arm, seed, error) of cells that failed.
        classes: Of each data set, in the order of the probabilities.
        regions: (data set, fold) -> what pre-training saw as regions (a hash) -> the arms that must have seen the same: more than one hash is a fault.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[tuple[str, str, str, str], Answers] = field(default_factory=dict)
    detections: dict[tuple[str, str], Detections] = field(default_factory=dict)
    folds: dict[str, FoldPatients] = field(default_factory=dict)
    failed: list[tuple[str, str, str, str]] = field(default_factory=list)
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    regions: dict[tuple[str, int], dict[str, list[str]]] = field(default_factory=dict)

    def arms(self, data: str) -> list[str]:
        """Arms with a finished task of a data set, in their order of value."""
        known = list(ARMS)
        names = dict.fromkeys(row["arm"] for row in self.rows if row["data_set"] == data and row["status"] == "done")
        return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def read_fold_patients(folder: Path) -> FoldPatients:
    """Read OUT/folds/DATA_SET.

    Raises:
        StudyError: there are no folds.
    """
    test: dict[int, dict[str, str]] = {}
    for path in sorted(folder.glob("*.csv")):
        if path.stem.isdigit():
            data = read_index(path)
            test[int(path.stem)] = {image_name(row): data.unit(k) for k, row in enumerate(data.rows) if row.split == "test"}
    if not test:
        raise StudyError(f"collect: folds must be in {folder}, got none. Run the study, or make them with write_folds.")
    facts = _json(folder / "folds.json")
    if not isinstance(facts, dict):
        raise StudyError(f"collect: {folder / 'folds.json'} must hold the facts of the folds, got {type(facts).__name__}. Remove it and run the study again.")
    return FoldPatients(test, facts)


def collect(out: str | Path) -> Collected:
    """Read all finished and failed cells of a study.

    Args:
        out: Folder of the study.

    Raises:
        StudyError: no cell; a cell's predictions are of images that its fold does not test, or of a class that the others do not
            have; or cells of one arm were run with different settings.
    """
    root = Path(out)
    found = Collected()
    parts: dict[tuple[str, str, str, str], list[Answers]] = {}
    boxes: dict[tuple[str, str], list[tuple[int, Path]]] = {}
    hashes: dict[tuple[str, str], set[tuple[str, str | None]]] = {}
    for cell in _cells(root):
        data, arm, seed = cell.parts[-3:]
        facts = _json(cell / "cell.json")
        tasks = sorted(path.parent for path in cell.glob("*/metrics.json"))
        if facts.get("status") == "failed":
            tasks = [folder for folder in tasks if folder.name in (facts.get("tasks") or ())]  # what had come to its end before another task failed
            error = str(facts.get("error") or "no reason given") + (f" (results before that count: {', '.join(folder.name for folder in tasks)})" if tasks else "")
            found.failed.append((data, arm, seed, error))
            found.rows.append(_row(cell, facts, {}, status="failed", error=error if tasks else facts.get("error")))
            if not tasks:
                continue
        elif facts.get("status") != "done":
            continue  # still running, or killed: the same command goes on with it
        found.failed += [(data, arm, seed, f"{error} (in an earlier call; a later one came to an end)") for error in facts.get("failed_before") or () if facts["status"] == "done"]
        if data not in found.folds:
            found.folds[data] = read_fold_patients(root / "folds" / data)
        patients = found.folds[data].test.get(int(facts.get("fold", seed)))
        if patients is None:
            raise StudyError(f"collect: cell {data}/{arm}/{seed} must be of one of the {len(found.folds[data].test)} folds, got fold {facts.get('fold', seed)}. "
                             "Was the study begun with others?")
        if facts.get("config_hash"):
            hashes.setdefault((data, arm), set()).add((facts["config_hash"], facts.get("base_hash")))
        if (digest := _regions(cell / "run", arm)) is not None:
            found.regions.setdefault((data, int(facts.get("fold", seed))), {}).setdefault(digest, []).append(arm)
        for folder in tasks:
            report = _json(folder / "metrics.json")
            for endpoint, value in _figures(report):
                found.rows.append(_row(cell, facts, report, task=folder.name, endpoint=endpoint, value=value, status="done"))
            where = f"{data}/{arm}/{seed}/{folder.name}"
            if (folder / "predictions.csv").is_file():
                for endpoint, answers in _answers(folder / "predictions.csv", int(facts.get("fold", seed)), patients, found, data, where):
                    parts.setdefault((data, arm, folder.name, endpoint), []).append(answers)
            elif (folder / "predictions.json").is_file():
                boxes.setdefault((data, arm), []).append((int(facts.get("fold", seed)), folder))
    if not found.rows:
        raise StudyError(f"collect: cells must be in {root / 'cells'}, got none that is finished. Run `mwm study` first.")
    for (data, arm), values in hashes.items():
        # With other settings of a task since, cells share what is not of tasks; those of before that was written share everything.
        if len({full for full, _ in values}) > 1 and (None in (bases := {base for _, base in values}) or len(bases) > 1):
            raise StudyError(f"collect: all cells of an arm must have the same settings, got {len(values)} kinds for {data}/{arm}. Remove the cells of the old settings.")
    found.answers = {key: _joined(held) for key, held in parts.items()}
    for key, held in boxes.items():
        found.detections[key] = read_detections(held, found.folds[key[0]].test)
    return found


def _cells(root: Path) -> Iterator[Path]:
    yield from sorted(path for path in (root / "cells").glob("*/*/*") if path.is_dir() and path.name.isdigit())


def _regions(run: Path, name: str) -> str | None:
    """Hash of the regions of a run, of arms that share those of the study; made anew on a GPU between two pieces of a study they may differ."""
    try:
        kind = arm_named(name)
        if kind.source != MAIN or kind.shuffled or kind.foreground or not kind.pretrain:
            return None
        return (yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")).get("resolved") or {}).get("regions")
    except (OSError, AttributeError, yaml.YAMLError, StudyError):
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except OSError:
        return {}
    except ValueError as error:
        raise StudyError(f"collect: {path} must be JSON, got something else. Remove its folder and run the study again.") from error


def _figures(report: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """Endpoint and value of everything that metrics.json gives for the test."""
    for name, figure in (report.get("test") or {}).items():
        if isinstance(figure, dict) and "value" in figure:
            yield name, figure["value"]


def _row(cell: Path, facts: Mapping[str, Any], report: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    data, arm, seed = cell.parts[-3:]
    test, run = report.get("test") or {}, cell / "run"
    wall = facts.get("wall_seconds") or {}
    held = {"data_set": data, "arm": arm, "seed": int(seed), "fold": int(facts.get("fold", seed)), "regions": facts.get("regions"), "uses_labels": facts.get("uses_labels"),
            "supervised_region_source": facts.get("supervised_region_source"), "images": test.get("images"), "patients": test.get("patients"),
            "hidden_share": facts.get("hidden_share"), "step_ms": facts.get("step_ms"), "pretrain_seconds": wall.get("pretrain"), "task_seconds": wall.get(more.get("task", "")),
            "encoder_gflop": facts.get("encoder_gflop_per_image", _gflop(run, facts.get("hidden_share"))), "config_hash": facts.get("config_hash"),
            "device": facts.get("device") or _json(run / "run.json").get("device"), "commit": facts.get("commit") or _json(run / "run.json").get("commit"), **more}
    return {name: held.get(name) for name in COLUMNS}


def _gflop(run: Path, hidden: float | None) -> float | None:
    """GFLOP of the encoder per pre-training image; None where there was no pre-training."""
    if hidden is None or not (run / "config.yaml").is_file():
        return None
    config = read_yaml(run / "config.yaml")
    size = config["image_size"]
    return round((1 - hidden) * dense_gflop(config["encoder"], tuple(size) if isinstance(size, list) else (size, size), config.get("channels") or 1), 3)


def _answers(path: Path, fold: int, patients: Mapping[str, str], found: Collected, data: str, where: str) -> Iterator[tuple[str, Answers]]:
    """Test rows of predictions.csv: (endpoint, answers); "" for classification."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        rows = [row for row in reader if row.get("split") == "test"]
    known = {file_cell(name): name for name in patients}
    strangers = [row["file"] for row in rows if row["file"] not in known]
    if strangers:
        raise StudyError(f"collect: test predictions of {where} must be of the images that fold {fold} tests, got {len(strangers)} others (the first is {strangers[0]!r}). "
                         "A model must not be tested on what it may have seen; remove the cell and run it again.")
    names = tuple(known[row["file"]] for row in rows)
    base = (names, np.full(len(rows), fold), tuple(patients[name] for name in names))
    classes = tuple(column[2:] for column in columns if column.startswith("p_"))
    if classes:
        if found.classes.setdefault(data, classes) != classes:
            raise StudyError(f"collect: all cells of {data} must have the classes {', '.join(found.classes[data])}, got {', '.join(classes)} in {where}. Remove the cell.")
        cells = [text_cell(name) for name in classes]
        scores = np.array([[float(row[f"p_{name}"]) for name in classes] for row in rows])
        yield "", Answers(*base, np.array([cells.index(row["label"]) for row in rows]), scores)
    for name in _MASKS:
        if name in columns:
            yield name, Answers(*base, np.zeros(0, dtype=np.int64), np.array([float(row[name]) if row[name] else math.nan for row in rows]))


def _joined(parts: list[Answers]) -> Answers:
    return Answers(tuple(name for part in parts for name in part.file), np.concatenate([part.fold for part in parts]), tuple(name for part in parts for name in part.patient),
                   np.concatenate([part.truth for part in parts]), np.concatenate([part.scores for part in parts]))


def write_rows(rows: list[dict[str, Any]], path: str | Path) -> Path:
    """The long CSV: one row per cell, task and endpoint, and one per failed cell."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if row[name] is None else row[name] for name in COLUMNS} for row in rows)
    write_text(Path(path), buffer.getvalue())
    return Path(path)


def write_answers(found: Collected, folder: str | Path) -> list[Path]:
    """Pooled test answers, DATA_SET.ARM.TASK.csv each: file, fold, and either label and probabilities or one figure per image. They name files, so they stay local."""
    target, written = Path(folder), []
    target.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, str, str], dict[str, Answers]] = {}
    for (data, arm, task, endpoint), answers in found.answers.items():
        groups.setdefault((data, arm, task), {})[endpoint] = answers
    for (data, arm, task), held in groups.items():
        first = next(iter(held.values()))
        classes = found.classes.get(data, ())
        header = ["file", "fold", *(["label", *(f"p_{name}" for name in classes)] if "" in held else held)]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(header)
        for k, name in enumerate(first.file):
            values = [classes[int(first.truth[k])], *(f"{p:.6f}" for p in first.scores[k])] if "" in held else [
                "" if math.isnan(part.scores[k]) else f"{part.scores[k]:.6f}" for part in held.values()]
            writer.writerow([name, int(first.fold[k]), *values])
        path = target / f"{data}.{arm}.{task}.csv"
        write_text(path, buffer.getvalue())
        written.append(path)
    return written
