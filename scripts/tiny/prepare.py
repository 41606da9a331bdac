"""Read the scans that `tiny` learns from into arrays: images, label maps, modality, split.

Only CC BY rows of brain_mri and chest_xray, and chest_ct with the pseudo-masks of `pseudo_masks.py`, are read. Rows under a
share-alike or non-commercial licence are left out, also where a set mixes licences.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

SIDE = 192
BACKGROUND, TUMOUR, RIGHT, LEFT, UNKNOWN = 0, 1, 2, 3, 4
TUMOUR_KINDS = {"glioma": 1, "meningioma": 2, "pituitary_tumor": 3}
MODALITY = {"brain_mri": 0, "chest_xray": 1, "chest_ct": 2}


@dataclass
class Scans:
    """Arrays of N scans.

    Attributes:
        images: Stretched to a square, grey. uint8 [N, SIDE, SIDE]
        labels: BACKGROUND, TUMOUR, RIGHT, LEFT, or UNKNOWN (no lung mask: not learnt from). uint8 [N, SIDE, SIDE]
        modality: Index into MODALITY. int64 [N]
        kind: 0, or the kind of tumour. int64 [N]
        names: Paths relative to the data folder.
        patients: Patient or block of slices.
    """

    images: np.ndarray
    labels: np.ndarray
    modality: np.ndarray
    kind: np.ndarray
    names: list[str]
    patients: list[str]


def may_be_used(licence: str) -> bool:
    """CC BY, and neither share-alike nor non-commercial."""
    return "CC BY" in licence and "SA" not in licence and "NC" not in licence


def split_lungs(mask: np.ndarray) -> np.ndarray:
    """Label map of a two-lung mask: the component at image left is the patient's right lung. bool [H, W] -> uint8 [H, W]"""
    labels, n = ndimage.label(mask)
    out = np.zeros(mask.shape, np.uint8)
    if n == 0:
        return out
    sizes = ndimage.sum_labels(mask, labels, range(1, n + 1))
    columns = np.array([c for _, c in ndimage.center_of_mass(mask, labels, range(1, n + 1))])
    two = np.argsort(sizes)[::-1][:2]
    middle = columns[two].mean() if n > 1 else 0.5 * mask.shape[1]
    for k in range(n):
        out[labels == k + 1] = RIGHT if columns[k] < middle else LEFT
    return out


def read_rows(data: Path, name: str, split: str) -> list[dict[str, str]]:
    """Rows of one set and split that may be used."""
    with (data / name / "index.csv").open() as stream:
        return [r for r in csv.DictReader(stream) if r["split"] == split and may_be_used(r["licence"])]


def read_label(data: Path, name: str, row: dict[str, str], pseudo: dict[str, Path]) -> np.ndarray | None:
    """Label map at the size of the file, None where it is not known. -> uint8 [H, W]"""
    if name == "chest_ct":
        path = pseudo.get(row["file"])
        if path is None:
            return None
        sides = np.asarray(Image.open(path))
        return np.where(sides == 1, RIGHT, np.where(sides == 2, LEFT, BACKGROUND)).astype(np.uint8)
    if not row["mask"]:
        return None
    mask = np.asarray(Image.open(data / name / row["mask"]).convert("L")) > 127
    return split_lungs(mask) if name == "chest_xray" else np.where(mask, TUMOUR, BACKGROUND).astype(np.uint8)


def read_pseudo(folder: Path) -> dict[str, Path]:
    """Kept pseudo-masks by file of chest_ct."""
    with (folder / "index.csv").open() as stream:
        return {r["file"]: folder / f"{Path(r['file']).stem}.png" for r in csv.DictReader(stream) if r["kept"] == "1"}


def prepare(data: Path, pseudo_folder: Path, split: str) -> Scans:
    """Read one split of the three sets.

    Args:
        data: Folder of the sets.
        pseudo_folder: Output of `pseudo_masks.py`.
        split: "train", "val" or "test".
    """
    pseudo = read_pseudo(pseudo_folder)
    images, labels, modality, kind, names, patients = [], [], [], [], [], []
    for name, index in MODALITY.items():
        for row in read_rows(data, name, split):
            label = read_label(data, name, row, pseudo)
            image = Image.open(data / name / row["file"]).convert("L")
            if label is None:
                label = np.full((image.height, image.width), UNKNOWN, np.uint8)
            images.append(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
            labels.append(np.asarray(Image.fromarray(label).resize((SIDE, SIDE), Image.Resampling.NEAREST)))
            modality.append(index)
            kind.append(TUMOUR_KINDS.get(row["label"], 0) if name == "brain_mri" else 0)
            names.append(f"{name}/{row['file']}")
            patients.append(row["patient"])
    return Scans(np.stack(images), np.stack(labels), np.array(modality), np.array(kind), names, patients)


def heal(image: np.ndarray, label: np.ndarray) -> np.ndarray | None:
    """A brain slice without its tumour: the tumour is covered by the mirrored other half. None where that is not possible.

    Args:
        image: uint8 [SIDE, SIDE]
        label: Label map. uint8 [SIDE, SIDE]
    """
    head = ndimage.binary_fill_holes(ndimage.binary_opening(image > 20, iterations=2))
    if not head.any():
        return None
    columns = np.flatnonzero(head.sum(0) > 0.15 * head.sum(0).max())
    shift = columns[0] + columns[-1] - (SIDE - 1)
    wide = ndimage.binary_dilation(label == TUMOUR, iterations=7)
    mirrored = np.roll(image[:, ::-1], shift, 1)
    if (wide & np.roll(wide[:, ::-1], shift, 1)).any() or wide.mean() > 0.12:
        return None
    alpha = np.clip(ndimage.gaussian_filter(wide.astype(np.float32), 2.5) * 1.6, 0, 1)
    return (alpha * mirrored + (1 - alpha) * image).astype(np.uint8)
