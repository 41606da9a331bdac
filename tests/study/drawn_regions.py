"""A drawn data set whose regions are known: a bright disc per image, its mask, patients, classes and splits in an index CSV."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image


def write_set(folder: Path, patients: int = 12, images: int = 3, size: tuple[int, int] = (48, 40), *, mask_of: tuple[str, ...] = ("train", "val", "test")) -> Path:
    """Draw images/ and masks/ and write index.csv; patients 0 … are train (3 of 5), val and test in turn, of two classes in turn."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    height, width = size
    y, x = np.mgrid[:height, :width]
    rows = []
    for p in range(patients):
        split = ("train", "train", "train", "val", "test")[p // 2 % 5]
        for k in range(images):
            cy, cx = rng.uniform(0.3, 0.7, 2) * (height, width)
            disc = (x - cx) ** 2 + (y - cy) ** 2 < (0.18 * width) ** 2
            picture = 60 + 20 * rng.standard_normal(size) + 120 * disc
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"p{p:02d}_{k}.png")
            Image.fromarray((255 * disc).astype(np.uint8)).save(folder / "masks" / f"p{p:02d}_{k}.png")
            rows.append({"file": f"images/p{p:02d}_{k}.png", "split": split, "label": ("round", "rounder")[p % 2], "patient": f"p{p:02d}",
                         "mask": f"masks/p{p:02d}_{k}.png" if split in mask_of else ""})
    with (folder / "index.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "index.csv"
