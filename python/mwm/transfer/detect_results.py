"""What a detection run leaves behind: metrics.json, predictions.json and ground_truth.json, gallery.png, history.csv and the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mwm import view
from mwm.data import ReadSettings, SkippedFiles, read_image
from mwm.train.export import Encoder
from mwm.transfer.coco import decode
from mwm.transfer.config import FinetuneConfig
from mwm.transfer.detect_images import Scene
from mwm.transfer.detect_model import Detector
from mwm.transfer.fit import Fitted
from mwm.transfer.labelled import Labelled
from mwm.transfer.results import base_report, new_results, write_history
from mwm.transfer.stored import StoredModel, write_model
from mwm.view.contours import PREDICTED_RGB, TRUTH_RGB, contours
from mwm.view.pixels import font

SHOWN = 0.3  # least score of a detection in a picture
_EDGE = 288
_GALLERY = 12


def write_detection(out: Path, config: FinetuneConfig, encoder: Encoder, data: Labelled, model: Detector, fitted: Fitted, truth: dict[str, Any],
                    results: Sequence[dict[str, Any]], figures: Mapping[str, Any], skipped: SkippedFiles, scenes: Sequence[Scene], *, seconds: float,
                    command: str | None) -> None:
    """Write everything to a temporary folder beside `out`, then put it in place, and print the figures of the test.

    metrics.json and the picture hold no file names and no patients; ground_truth.json is local and holds relative file names.

    Args:
        out: Folder of the results.
        config: The settings.
        encoder: What the detector stands on.
        data: Cases and notes.
        model: The trained detector.
        fitted: History and choice.
        truth: COCO data set of the test.
        results: COCO results of the test.
        figures: By split, from `detection_metrics`.
        skipped: Files that could not be read.
        scenes: Of the test, in the order of the image ids.
        seconds: Wall time.
        command: The command line.
    """
    method = "Mask R-CNN" if model.masks else "Faster R-CNN"
    settings = ReadSettings.from_dict(encoder.preprocessing.read)
    with new_results(out) as folder:
        report = base_report(config, encoder, data, method=method, seconds=seconds, command=command)
        report |= {**figures, "chosen_on_val": fitted.chosen, "chosen_by": "val_score: mean of box and mask AP less a thousandth of the loss"}
        (folder / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
        (folder / "predictions.json").write_text(json.dumps(list(results)))
        (folder / "ground_truth.json").write_text(json.dumps(truth))
        write_history(folder / "history.csv", fitted.history)
        view.save(gallery(scenes, truth, results, settings), folder / "gallery.png")
        facts = {"masks": model.masks, "width": config.detect_width}
        write_model(folder, StoredModel("detect", method, encoder.name, data.classes, encoder.preprocessing, facts), model.state_dict() if config.store_weights else None)
        skipped.write(folder / "skipped.csv")
    if config.progress or command:
        print(summary(figures["test"]))
        print(f"results in {out}")


def gallery(scenes: Sequence[Scene], truth: dict[str, Any], results: Sequence[dict[str, Any]], settings: ReadSettings, *, count: int = _GALLERY) -> Image.Image:
    """Truth and detections of some images side by side, evenly taken from the list so that nobody chose them.

    Args:
        scenes: In the order of the image ids.
        truth: COCO data set.
        results: COCO results, best first in each image.
        settings: How to read the images; shown at their stored size.
        count: Images.
    """
    names = {row["id"]: row["name"] for row in truth["categories"]}
    sheet = view.Sheet()
    picked = np.unique(np.linspace(0, len(scenes) - 1, min(count, len(scenes))).round().astype(int))
    pictures = []
    for k in picked.tolist():
        image = read_image(scenes[k].case.record, replace(settings, size=None)).numpy()
        objects = [row for row in truth["annotations"] if row["image_id"] == k + 1]
        found = [row for row in results if row["image_id"] == k + 1 and row["score"] >= SHOWN][:10]
        words = ", ".join(sorted({names[row["category_id"]] for row in objects})) or "nothing"
        called = ", ".join(f"{names[row['category_id']]} {row['score']:.2f}" for row in found[:2]) or f"nothing above {SHOWN}"
        called += f" and {len(found) - 2} more" if len(found) > 2 else ""
        pictures += [view.Cell(draw(image, objects, TRUTH_RGB), f"truth: {words}"), view.Cell(draw(image, found, PREDICTED_RGB), f"found: {called}")]
    for k in range(0, len(pictures), 4):
        sheet.add("turquoise: truth; orange: what was found, with its score" if not k else "", *pictures[k : k + 4])
    return sheet.image()


def draw(image: np.ndarray, rows: Sequence[Mapping[str, Any]], colour: tuple[int, int, int], *, edge: int = _EDGE) -> Image.Image:
    """An image with the boxes, masks and scores of COCO rows.

    Args:
        image: float in [0, 1]. [C, H, W]
        rows: With bbox, perhaps segmentation and score.
        colour: Of lines and words.
        edge: Pixels on the longer side of the picture.
    """
    height, width = image.shape[-2:]
    labels = np.zeros((height, width), np.int32)
    for n, row in reversed(list(enumerate(rows))):  # the best one on top
        if "segmentation" in row:
            labels[decode(row["segmentation"])] = n + 1
    masks = labels if labels.any() else None
    picture = contours(image, masks if colour == TRUTH_RGB else None, masks if colour != TRUTH_RGB else None, size=edge)
    scale, pen, small = picture.width / width, ImageDraw.Draw(picture), font(13)
    boxes = [[value * scale for value in row["bbox"]] for row in rows]
    for x, y, w, h in boxes:
        pen.rectangle((x, y, x + w, y + h), outline=colour, width=1)
    tags: list[tuple[float, float, float, float]] = []
    for row, (x, y, _, h) in zip(rows, boxes, strict=True):
        if "score" in row:
            words = f"{row['score']:.2f}"
            top = y - 16 if y >= 16 else min(y + h + 1, picture.height - 16)
            left = max(0.0, min(x, picture.width - pen.textlength(words, small) - 4))
            tag = (left, top, left + pen.textlength(words, small) + 4, top + 15)
            if all(tag[0] > other[2] or tag[2] < other[0] or tag[1] > other[3] or tag[3] < other[1] for other in tags):
                tags.append(tag)  # of scores that would cover each other the best one is written
                pen.rectangle(tag, fill=(20, 20, 20))
                pen.text((left + 2, top), words, fill=colour, font=small)
    return picture


def summary(figures: Mapping[str, Any]) -> str:
    """Test figures as a table of text."""
    basis = f"{figures['images']} images, {figures['objects']} objects" + (f", {figures['patients']} patients" if figures["patients"] is not None else "; patients not known")
    words = {"ap": "AP 0.5 … 0.95", "ap50": "AP 0.5", "ap75": "AP 0.75", "ap_small": "AP small", "ap_medium": "AP medium", "ap_large": "AP large", "ar": "recall"}
    lines = [f"test ({basis})"]
    for prefix in ("box", "mask"):
        for name, text in words.items():
            value = figures.get(f"{prefix}_{name}")
            if value is None or value["value"] is None:
                continue
            interval = "" if value["low"] is None else f"   95 % interval {value['low']:.3f} to {value['high']:.3f}"
            lines.append(f"  {prefix:4s} {text:14s} {value['value']:.3f}{interval}")
    if figures.get("box_ap50", {}).get("value") == 0:
        lines.append("  no object was found with half an overlap: history.csv shows whether training had got anywhere; --epochs and --patience make it longer")
    return "\n".join(lines)
