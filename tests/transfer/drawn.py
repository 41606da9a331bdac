"""A drawn data set whose classes a probe can tell apart."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 32


def draw(rng: np.random.Generator, label: str) -> Image.Image:
    """A noisy square picture on a cloudy ground, so that no two are near-identical; the classes differ in the direction of their stripes."""
    stripes = np.sin(np.arange(SIZE) * 1.3 + rng.uniform(0, 6))
    clouds = np.asarray(Image.fromarray(rng.uniform(-70, 70, (9, 9)).astype(np.float32)).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    picture = 120 + 50 * (np.tile(stripes, (SIZE, 1)) if label == "along" else np.tile(stripes[:, None], (1, SIZE))) + clouds + rng.normal(0, 12, (SIZE, SIZE))
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def write_index(folder: Path, rows: list[dict[str, str]]) -> Path:
    """Draw the images of rows (file, label, …) and write index.csv."""
    rng = np.random.default_rng(0)
    for row in rows:
        path = folder / row["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(rng, row["label"]).save(path)
    with (folder / "index.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "index.csv"


def rows_with_patients(patients: int = 30, images: int = 2) -> list[dict[str, str]]:
    """Rows without splits: each patient has one class and several images."""
    return [{"file": f"images/p{p:02d}_{k}.png", "label": ("along", "across")[p % 2], "patient": f"p{p:02d}"} for p in range(patients) for k in range(images)]


def with_splits(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Splits by patient: 60 % train, 20 % val, 20 % test."""
    return [row | {"split": ("train", "train", "train", "val", "test")[int(row["patient"][1:]) // 2 % 5]} for row in rows]
