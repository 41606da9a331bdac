"""A drawn data set with masks: bright discs and squares on noise, several images per patient."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 32
COLUMNS = ["file", "split", "label", "patient", "mask"]


def shape(rng: np.random.Generator, kind: str, size: tuple[int, int]) -> np.ndarray:
    """A mask of one disc or square away from the border. bool [H, W]"""
    radius = int(rng.integers(5, 9))
    row, column = (int(rng.integers(radius, edge - radius)) for edge in size)
    y, x = np.mgrid[: size[0], : size[1]]
    if kind == "disc":
        return (y - row) ** 2 + (x - column) ** 2 <= radius**2
    return (abs(y - row) <= radius) & (abs(x - column) <= radius)


def masked_rows(folder: Path, *, patients: int = 15, images: int = 4, size: tuple[int, int] = (SIZE, SIZE), values: tuple[int, int] = (255, 255),
                empty_every: int = 0) -> list[dict[str, str]]:
    """Draw images and masks; patients go to train, train, train, val, test in turn.

    Args:
        folder: Where images/ and masks/ are made.
        patients: Number of them.
        images: Per patient; even ones show a disc, odd ones a darker square.
        size: Of all images.
        values: Of the masks of discs and squares.
        empty_every: Every so many images nothing is drawn.
    """
    rng = np.random.default_rng(0)
    rows = []
    for p in range(patients):
        for k in range(images):
            kind, name = ("disc", "square")[k % 2], f"p{p:02d}_{k}.png"
            mask = shape(rng, kind, size)
            if empty_every and (p * images + k) % empty_every == 0:
                mask = np.zeros(size, bool)
            picture = 60 + (110 if kind == "disc" else 60) * mask + rng.normal(0, 12, size)
            for part, values_of in (("images", np.clip(picture, 0, 255)), ("masks", mask * values[k % 2])):
                (folder / part).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values_of.astype(np.uint8)).save(folder / part / name)
            rows.append({"file": f"images/{name}", "split": ("train", "train", "train", "val", "test")[p % 5], "label": kind, "patient": f"p{p:02d}",
                         "mask": f"masks/{name}"})
    return rows


def write_rows(folder: Path, rows: list[dict[str, str]]) -> Path:
    """index.csv in a folder."""
    with (folder / "index.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return folder / "index.csv"
