"""The scans that the package ships, and how the demo uses them."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mwm.data import ReadSettings, Record, demo_folder, read_image, read_list

PROMPTS = {"brain_mri": "brain tumour", "chest_ct": "lungs", "chest_xray": "both lungs"}
TITLES = {"brain_mri": "Brain MRI", "chest_ct": "Chest CT", "chest_xray": "Chest X-ray"}
SHOWN = {"brain_mri": "mri_008.jpg", "chest_ct": "ct_022.jpg", "chest_xray": "xray_044.jpg"}
"""The scan of each kind that the report shows, chosen because the structure is easy to see; the first of its kind where it is missing."""

ASPECT = "stretch"
"""Padding would show the aspect ratio as black bars, and with it a clue to age and label that is no finding."""

PROBED = ("bacterial_pneumonia", "viral_pneumonia")


@dataclass(frozen=True)
class Scans:
    """The shipped scans.

    Attributes:
        index: the index CSV.
        records: one per scan.
        attribution: (set, source, licence), one row per combination.
    """

    index: Path
    records: list[Record]
    attribution: list[tuple[str, str, str]]

    def of(self, kind: str) -> list[Record]:
        """The scans of one kind: brain_mri, chest_ct or chest_xray."""
        return [record for record in self.records if kind_of(record) == kind]

    def shown(self, kind: str) -> Record:
        """The scan of a kind that the report shows."""
        found = self.of(kind)
        return next((record for record in found if Path(record.name).name == SHOWN.get(kind)), found[0])

    def probed(self) -> tuple[list[Record], np.ndarray, list[str]]:
        """X-rays with one of two labels: records, labels (0 or 1) [N], patients."""
        found = [record for record in self.of("chest_xray") if record.label in PROBED]
        return found, np.array([PROBED.index(record.label) for record in found]), [record.patient for record in found]


def kind_of(record: Record) -> str:
    """brain_mri, chest_ct or chest_xray."""
    return Path(record.name).parts[0]


def load_scans() -> Scans:
    """Find the shipped scans."""
    index = demo_folder() / "index.csv"
    records = [dataclasses.replace(record, prompt=PROMPTS[kind_of(record)]) for record in read_list(index)]
    with index.open(newline="", encoding="utf-8") as file:
        rows = {(TITLES.get(Path(row["file"]).parts[0], row["file"]), row.get("source", ""), row.get("licence", "")) for row in csv.DictReader(file)}
    return Scans(index, records, sorted(rows))


def read_scans(records: Sequence[Record], size: int) -> Tensor:
    """Scans as one batch of grey images in [0, 1]. float32 [B, 1, size, size]"""
    settings = ReadSettings(size=(size, size))
    return torch.stack([read_image(record, settings, channels=1) for record in records])
