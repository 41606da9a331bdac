"""A study folder with invented results, for tests of what is read from it: no network, no training."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

from mwm.data.csv_cells import file_cell, text_cell
from mwm.study.folds import Folds, write_folds

ARMS = {"uniform": (0.0, 0.6, 40.0), "region": (0.9, 0.6, 41.0), "shuffled": (0.1, 0.6, 41.0), "uniform60": (0.3, 0.59, 45.0), "scratch": (-0.6, None, None)}
"""Arm -> quality, hidden share, milliseconds per step."""


def data_set(folder: Path, *, patients: int = 8, each: int = 4, classes: tuple[str, ...] = ("cyst", "scar"), seed: int = 0) -> Path:
    """An index CSV with noise images."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    with (folder / "index.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "split", "label", "patient"])
        for label in classes:
            for p in range(patients):
                for k in range(each):
                    name = f"{label}_{p}_{k}.png"
                    Image.fromarray(generator.integers(0, 255, (12, 12), dtype=np.uint8)).save(folder / name)
                    writer.writerow([name, "train", label, f"secret-{label}{p}"])
    return folder / "index.csv"


def study(out: Path, index: Path, *, arms: dict[str, tuple[float, float | None, float | None]] | None = None, folds: int | str = 5, seed: int = 0,
          tasks: tuple[str, ...] = ("classify", "segment"), name: str | None = None) -> Folds:
    """Folds and a finished cell for every arm and fold: probabilities and Dice that are better with the arm's quality; patients are shared by all arms."""
    made = write_folds(index, out, folds=folds, merge_alike=False, name=name)
    generator = np.random.default_rng(seed)
    hard: dict[str, float] = {}
    for fold, path in enumerate(made.paths):
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
        for arm, (quality, hidden, step) in (ARMS if arms is None else arms).items():
            cell = out / "cells" / made.name / arm / str(fold)
            facts = {"data_set": made.name, "arm": arm, "seed": fold, "fold": fold, "status": "done", "error": None, "uses_labels": arm == "roi",
                     "supervised_region_source": arm in ("region", "shuffled", "uniform"), "regions": "supervised region source" if arm == "region" else "no regions",
                     "wall_seconds": {"classify": 20.0, "segment": 30.0} | ({} if hidden is None else {"pretrain": 100.0}), "config_hash": f"hash-{arm}",
                     "device": "cpu", "commit": "0123456789abcdef"}
            if hidden is not None:
                facts |= {"hidden_share": hidden, "step_ms": step}
                (cell / "run").mkdir(parents=True)
                (cell / "run" / "config.yaml").write_text("encoder: resnet10t\nimage_size: 64\nchannels: 1\n")
            cell.mkdir(parents=True, exist_ok=True)
            (cell / "cell.json").write_text(json.dumps(facts))
            for task in tasks:
                (cell / task).mkdir()
                lines, values = [], []
                for row in rows:
                    effect = hard.setdefault(row["patient"], float(generator.normal(0, 0.7)))
                    sign = made.classes.index(row["label"])
                    scores = np.exp(np.eye(len(made.classes))[sign] * (1 + quality + effect) + generator.normal(0, 0.6, len(made.classes)))
                    values.append(float(np.clip(0.6 + 0.1 * quality + 0.1 * effect + generator.normal(0, 0.05), 0, 1)))
                    dice = values[-1]
                    figures = [f"{dice:.6f}", f"{dice / (2 - dice):.6f}", f"{dice:.6f}", f"{20 * (1 - dice):.3f}"]
                    answer = [text_cell(made.classes[int(scores.argmax())]), *(f"{p:.6f}" for p in scores / scores.sum())]
                    lines.append([file_cell(row["file"]), "test", text_cell(row["label"]), *(figures if task == "segment" else answer)])
                header = ["file", "split", "label", *(["predicted", *(f"p_{c}" for c in made.classes)] if task != "segment" else ["dice", "iou", "nsd", "hd95"])]
                with (cell / task / "predictions.csv").open("w", newline="") as file:
                    csv.writer(file).writerows([header, [file_cell(rows[0]["file"]), "val", text_cell(rows[0]["label"]), *["0.5"] * (len(header) - 3)], *lines])
                right = float(np.mean([line[2] == line[3] for line in lines])) if task != "segment" else float(np.mean(values))
                test = {"accuracy" if task != "segment" else "dice": {"value": right, "low": None, "high": None}, "images": len(rows),
                        "patients": len({r["patient"] for r in rows})}
                (cell / task / "metrics.json").write_text(json.dumps({"task": task, "test": test}))
    return made
