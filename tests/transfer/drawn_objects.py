"""A drawn data set of bright squares and dark discs on noise, as an index CSV or as COCO files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64


def picture(seed: int, objects: int = 1) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]]:
    """Noise with objects; each is (class, mask)."""
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.normal(0, 18, (8, 8)), np.ones((8, 8)))
    pixels = 110 + coarse + rng.normal(0, 10, (SIZE, SIZE))
    found = []
    rows, columns = np.mgrid[:SIZE, :SIZE]
    for k in range(objects):
        half = int(rng.integers(7, 12))
        y, x = int(rng.integers(half, SIZE - half)), int(rng.integers(half, SIZE // 2 - half)) + (SIZE // 2 if k % 2 else 0)
        name = ("disc", "square")[int(rng.integers(2))]
        mask = (abs(rows - y) < half) & (abs(columns - x) < half) if name == "square" else (rows - y) ** 2 + (columns - x) ** 2 < half**2
        pixels[mask] = (230 if name == "square" else 15) + rng.normal(0, 6, mask.sum())
        found.append((name, mask))
    return np.clip(pixels, 0, 255).astype(np.uint8), found


def box_of(mask: np.ndarray) -> list[float]:
    rows, columns = np.nonzero(mask)
    return [float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)]


def write_objects(folder: Path, *, patients: int = 24, masks: bool = True, boxes: bool = True, split: bool = True) -> Path:
    """Two images per patient; every sixth patient has no object in one of them. Returns index.csv."""
    rows = []
    for p in range(patients):
        for k in range(2):
            name = f"p{p:02d}_{k}"
            pixels, found = picture(100 * p + k, objects=0 if k and p % 6 == 0 else 1 + (p + k) % 2)
            for part in ("images", "masks"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
            whole = np.any([mask for _, mask in found], 0) if found else np.zeros((SIZE, SIZE), bool)
            if masks and found:
                Image.fromarray(whole.astype(np.uint8) * 255).save(folder / "masks" / f"{name}.png")
            rows.append({"file": f"images/{name}.png", "split": ("train", "train", "train", "val", "test")[p % 5] if split else "", "patient": f"p{p:02d}",
                         "mask": f"masks/{name}.png" if masks and found else "",
                         "boxes": json.dumps([{"label": label, "bbox_xyxy": box_of(mask)} for label, mask in found]) if boxes and found else ""})
    with (folder / "index.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "index.csv"


def rewrite(index: Path, change) -> Path:
    """Change rows of an index CSV in place: `change(row) -> row`."""
    with index.open(newline="") as stream:
        rows = [change(row) for row in csv.DictReader(stream)]
    with index.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return index


def as_coco(index: Path) -> dict:
    """The same data as one COCO data set with splits and patients."""
    from mwm.transfer.coco import encode

    names = {"disc": 4, "square": 9}
    content: dict = {"images": [], "annotations": [], "categories": [{"id": number, "name": name} for name, number in names.items()]}
    with index.open(newline="") as stream:
        for row in csv.DictReader(stream):
            number = len(content["images"]) + 10
            content["images"].append({"id": number, "file_name": Path(row["file"]).name, "width": SIZE, "height": SIZE, "split": row["split"], "patient": row["patient"]})
            _, found = picture(100 * int(row["patient"][1:]) + int(row["file"][-5]), objects=len(json.loads(row["boxes"] or "[]")))
            for name, mask in found:
                x0, y0, x1, y1 = box_of(mask)
                content["annotations"].append({"id": len(content["annotations"]) + 1, "image_id": number, "category_id": names[name], "iscrowd": 0,
                                               "bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": encode(mask), "area": int(mask.sum())})
    return content
