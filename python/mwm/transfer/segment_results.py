"""What a segmentation run leaves behind: metrics.json, predictions.csv, overlays.png, history.csv and the weights."""

from __future__ import annotations

import csv
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from mwm import view
from mwm.data import ReadSettings, SkippedFiles, read_image
from mwm.data.csv_cells import file_cell, text_cell
from mwm.train.export import Encoder
from mwm.transfer.config import FinetuneConfig
from mwm.transfer.fit import Fitted
from mwm.transfer.labelled import Case, Labelled
from mwm.transfer.mask_metrics import FIGURES
from mwm.transfer.results import base_report, new_results, write_history
from mwm.transfer.segment_masks import MaskClasses
from mwm.transfer.stored import StoredModel, write_model
from mwm.view.contours import contours, legend

_BODY = "encoder.body."


@dataclass(frozen=True)
class HeldLabels:
    """A label map of a whole stored image, compressed until a picture asks for it: of thousands of images a few are shown.

    Attributes:
        shape: (height, width).
        content: Of zlib.
    """

    shape: tuple[int, int]
    content: bytes

    @classmethod
    def of(cls, labels: NDArray[np.uint8]) -> HeldLabels:
        """uint8 [h, w]"""
        return cls(labels.shape, zlib.compress(np.ascontiguousarray(labels).tobytes(), 1))

    def labels(self) -> NDArray[np.uint8]:
        """uint8 [h, w]"""
        return np.frombuffer(zlib.decompress(self.content), np.uint8).reshape(self.shape)


def write_segmentation(out: Path, config: FinetuneConfig, encoder: Encoder, data: Labelled, classes: MaskClasses, network: nn.Module, fitted: Fitted,
                       rows: Mapping[str, Sequence[Mapping[str, Any]]], figures: Mapping[str, Any], skipped: SkippedFiles, *, unit: str, settings: ReadSettings,
                       seconds: float, command: str | None) -> None:
    """Write everything to a temporary folder beside `out`, then put it in place, and print the figures of the test.

    metrics.json and the pictures hold no file names and no patients; predictions.csv is local and holds relative file names.
    """
    with new_results(out) as folder:
        report = base_report(config, encoder, data, method="mask head", seconds=seconds, command=command)
        report |= {"classes": list(classes.names), **figures, "chosen_on_val": fitted.chosen, "surface_tolerance": {"value": config.surface_tolerance, "unit": unit},
                   "hd95_unit": unit}
        (folder / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
        write_predictions(folder / "predictions.csv", data, classes, rows)
        write_history(folder / "history.csv", fitted.history)
        view.save(overlay_gallery(data.of("test"), rows["test"], settings, unit=unit), folder / "overlays.png")
        facts = {"mask_classes": json.loads(classes.to_json()), "head_width": config.head_width, "head_norm": config.head_norm}
        write_model(folder, StoredModel("segment", "mask head", encoder.name, classes.names, encoder.preprocessing, facts),
                    plain_names(network.state_dict()) if config.store_weights else None)
        skipped.write(folder / "skipped.csv")
    if config.progress or command:
        print(summary_text(figures["test"], unit=unit, tolerance=config.surface_tolerance))
        print(f"results in {out}")


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names for a file: "encoder." before those of timm's `features_only` net (torchvision: of the model), "head." before those of the head."""
    return {"encoder." + key[len(_BODY):] if key.startswith(_BODY) else key: value for key, value in state.items()}


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of `SegmentationNetwork` again."""
    return {_BODY + key[len("encoder."):] if key.startswith("encoder.") else key: value for key, value in state.items()}


def write_predictions(path: Path, data: Labelled, classes: MaskClasses, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """predictions.csv: one row per image of val and test; a figure that is not defined is an empty cell."""
    several = list(classes.names) if len(classes.names) > 1 else []
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "split", "label", *FIGURES, "pointing", "truth_pixels", "predicted_pixels", *(f"dice_{name}" for name in several)])
        for split, found in rows.items():
            for case, row in zip(data.of(split), found, strict=True):
                by_class = [figures["dice"] if figures else math.nan for figures in row["by_class"]] if several else []
                numbers = [row[name] for name in FIGURES], row["pointing"]
                writer.writerow([file_cell(case.record.name), split, text_cell(data.classes[case.label]) if case.label >= 0 else "", *map(_cell, numbers[0]), _cell(numbers[1]),
                                 row["truth_pixels"], row["predicted_pixels"], *map(_cell, by_class)])


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6f}"


def overlay_gallery(cases: Sequence[Case], rows: Sequence[Mapping[str, Any]], settings: ReadSettings, *, unit: str, columns: int = 4):
    """Best, median and worst images of those with something to find (by Dice), truth and prediction outlined.

    Args:
        cases: Of the split.
        rows: Their figures with `truth` and `predicted`, a `HeldLabels` each.
        settings: How to read the images; shown at their stored size.
        unit: Of HD95.
        columns: Images per row.
    """
    marked = [k for k, row in enumerate(rows) if row["truth_pixels"]] or list(range(len(rows)))
    order = sorted(marked, key=lambda k: (-rows[k]["dice"], k))
    middle = max(0, len(order) // 2 - columns // 2)
    sheet = view.Sheet()
    shown: set[int] = set()
    for title, chosen in (("Best", order[:columns]), ("Median", order[middle : middle + columns]), ("Worst", order[-columns:])):
        fresh = [k for k in chosen if k not in shown]
        shown.update(fresh)
        cells = []
        for k in fresh:
            image = read_image(cases[k].record, replace(settings, size=None))
            row = rows[k]
            words = f"HD95 {row['hd95']:.1f} {unit}" if row["predicted_pixels"] and row["truth_pixels"] else "nothing found" if row["truth_pixels"] else "nothing to find"
            cells.append(view.Cell(contours(image.numpy(), row["truth"].labels(), row["predicted"].labels()), f"Dice {row['dice']:.2f}, {words}"))
        if cells:
            sheet.add(f"{title} of {len(order)}" + (f" ({legend()})" if title == "Best" else ""), *cells)
    return sheet.image()


def summary_text(figures: Mapping[str, Any], *, unit: str, tolerance: float) -> str:
    """Test figures as a table of text."""
    basis = f"{figures['images']} images, {figures['positives']} with something to find" + (
        f", of {figures['patients']} patients" if figures["patients"] is not None else "; patients not known")
    names = {"dice": "Dice", "iou": "IoU", "nsd": f"surface Dice at {tolerance:g} {unit}", "hd95": f"HD95, {unit}", "pointing": "pointing game"}
    if figures["positives"] < figures["images"]:
        names |= {"dice_positive": "Dice where something is", "marked_negatives": "empty images marked"}
    shown = {name: figures[key] for key, name in names.items()} | {f"Dice of {name}": value for name, value in figures.get("by_class", {}).items()}
    lines = [f"test ({basis})"]
    for name, value in shown.items():
        words = "not defined" if value["value"] is None else f"{value['value']:.3f}"
        if value["low"] is not None:
            words += f"   95 % interval {value['low']:.3f} to {value['high']:.3f}"
        lines.append(f"  {name:26s} {words}")
    if figures["dice_positive"]["value"] == 0:
        lines.append("  nothing was found in any image: history.csv shows whether training had got anywhere; --epochs and --patience make it longer")
    return "\n".join(lines)
