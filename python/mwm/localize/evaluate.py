"""How good regions are where there are masks: as outlines, and as what masking uses of them, patches of a grid.

Per image: Dice, IoU and normalised surface Dice of region (values from 0.5 on) and mask at the image's own size; the pointing game on the region's values
(whether its highest value lies in the mask; of a region of zeros and ones every pixel is highest, and it is the share of them in the mask: keep values with --soft); and on
the patch grid that masking sees, after the same resizing as in pre-training:

* roi_inside: share of the mask's patches that are region. This is what region-guided masking lives from, but a region that covers everything has 1, hence
* region_patches: share of all patches that are region, and
* excess = roi_inside - region_patches, which is 0 on average for a region of the same size at a random place, and for none and for everything.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mwm.data import DataError, MaskFolder, ReadSettings, Record, match_size, open_regions, read_record_mask
from mwm.data.csv_cells import file_cell
from mwm.data.geometry import fit
from mwm.data.image import decode
from mwm.data.mask_metrics import mean_with_interval, pair_figures, pointing_hit
from mwm.data.regions import RegionStore
from mwm.localize.training import source_line
from mwm.ops import region_coverage

FIGURES = ("dice", "iou", "nsd", "pointing", "roi_inside", "region_patches", "excess", "area", "roi_area")
"""Figures of an image, in the order of tables."""


@dataclass(frozen=True)
class GridSettings:
    """The grid on which patches count, as in pre-training.

    Attributes:
        image_size: Edge of the image, a multiple of `patch_size`.
        patch_size: Edge of a patch, in pixels.
        min_cover: Covered share from which a patch counts.
        aspect: How images of another shape are brought to a square.
    """

    image_size: int = 224
    patch_size: int = 32
    min_cover: float = 0.25
    aspect: str = "pad"

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise ValueError(f"eval: patch_size must divide image_size, got {self.patch_size} and {self.image_size}.")
        if not 0 < self.min_cover <= 1:
            raise ValueError(f"eval: min_cover must be in (0, 1], got {self.min_cover}.")


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_regions` found.

    Attributes:
        rows: Per image `file`, `hash` and the figures, NaN where one is not defined.
        summary: Per figure value, low and high of the 95 % interval over patients (images, where they are not known), over images whose mask is not empty;
            `images`, `patients`, `negatives` (empty masks), `marked_negatives` (share of them with a region), `empty` (share of regions that are empty, of images
            with a mask), `lost` (images without region).
        grid: The grid.
        tolerance: Of the surface Dice, in pixels.
        source: What the folder of regions says about where they come from (`meta.source`); None where it says nothing.
    """

    rows: tuple[dict[str, Any], ...]
    summary: dict[str, Any]
    grid: GridSettings
    tolerance: float
    source: dict[str, Any] | None = None

    def __str__(self) -> str:
        s, edge = self.summary, self.grid.image_size // self.grid.patch_size
        lines = [f"regions: {s['images']} images with a mask" + (f" of {s['patients']} patients" if s["patients"] else "") + f", {100 * s['empty']:.1f} % of their regions empty"
                 + (f"; {s['lost']} without a region left out" if s["lost"] else "")]
        if line := source_line(self.source):
            lines.append(line)
        if s["negatives"]:
            lines.append(f"         {s['negatives']} with an empty mask, {100 * s['marked_negatives']:.1f} % of them marked nevertheless; they do not count below")
        words = {"dice": "Dice", "iou": "IoU", "nsd": f"NSD at {self.tolerance:g} px", "pointing": "pointing game", "roi_inside": f"mask's patches inside, {edge}x{edge} grid",
                 "region_patches": "patches that are region", "excess": "excess over a random place", "area": "region's share", "roi_area": "mask's share"}
        for name in FIGURES:
            v = s[name]
            interval = "" if v["low"] is None else f"  [{v['low']:.3f}, {v['high']:.3f}]"
            lines.append(f"  {words[name]:34} " + ("    -" if v["value"] is None else f"{v['value']:.3f}{interval}"))
        return "\n".join(lines)

    def write_rows(self, path: str | Path) -> None:
        """The figures of every image as CSV; names files, so for your own eyes."""
        with Path(path).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["file", *FIGURES])
            writer.writerows([file_cell(row["file"]), *("" if row[name] != row[name] else f"{row[name]:.6g}" for name in FIGURES)] for row in self.rows)

    def examples(self, count: int = 3) -> dict[str, list[int]]:
        """Rows of the best, median and worst Dice, of images whose mask is not empty."""
        order = sorted((k for k, row in enumerate(self.rows) if row["roi_area"] > 0), key=lambda k: -self.rows[k]["dice"])
        count = max(1, min(count, len(order) // 3)) if order else 0
        middle = max(0, len(order) // 2 - count // 2)
        return {"best": order[:count], "median": order[middle : middle + count], "worst": order[len(order) - count :]}


def image_row(truth: Tensor, region: Tensor, grid: GridSettings, *, tolerance: float = 2.0, spacing: tuple[float, float] | None = None) -> dict[str, float]:
    """The figures of one image.

    Args:
        truth: The mask; values from 0.5 on count. float [H, W]
        region: float [H, W] in [0, 1]
        grid: The patch grid.
        tolerance: Of the surface Dice, in pixels of the image.
        spacing: Height and width of a pixel in one unit, for images that are not square; None for square pixels.
    """
    here, there = (x.detach().cpu().numpy() >= 0.5 for x in (truth, region))
    figures = pair_figures(here, there, tolerance=tolerance)
    read = ReadSettings(size=(grid.image_size, grid.image_size), aspect=grid.aspect)
    fitted = torch.stack([fit(x.float().cpu()[None], read, spacing)[0].clamp(0, 1) for x in (truth, region)])
    inside, _ = region_coverage(fitted, (grid.image_size // grid.patch_size,) * 2, min_cover=grid.min_cover)
    roi, found = inside[0], inside[1]
    share = float(found.float().mean())
    covered = float(found[roi].float().mean()) if bool(roi.any()) else math.nan
    return {"dice": figures["dice"], "iou": figures["iou"], "nsd": figures["nsd"],
            "pointing": (pointing_hit(here, region.detach().cpu().numpy()) if bool((region > 0).any()) else 0.0) if here.any() else math.nan,
            "roi_inside": covered, "region_patches": share, "excess": covered - share, "area": float(region.float().mean()), "roi_area": float(here.mean())}


def evaluate_regions(
    regions: str | Path | RegionStore,
    records: Sequence[Record],
    masks: str | Path | None = None,
    *,
    read: ReadSettings | None = None,
    grid: GridSettings | None = None,
    tolerance: float = 2.0,
    progress: bool = True,
) -> Evaluation:
    """Compare regions with masks.

    Args:
        regions: Folder made by `mwm localize`, folder of masks named like the images, or a store.
        records: The images.
        masks: Folder of masks named like the images; None takes those of the records.
        read: Orientation and slice axis of volumes.
        grid: The patch grid.
        tolerance: Of the surface Dice, in pixels of the image.
        progress: Show a progress bar.

    Returns:
        Figures per image and their means; print it.

    Raises:
        DataError: no image has a mask, or none has a region; a mask or region cannot be read or is of another shape.
    """
    store, folder = open_regions(regions), None if masks is None else MaskFolder(masks)
    grid, read = grid or GridSettings(), replace(read or ReadSettings(), size=None)
    rows, groups, lost = [], [], 0
    paired = [(record, path) for record in records if (path := folder.find(record) if folder else record.mask) is not None]
    if not paired:
        raise DataError(f"eval: images must have masks, got none for {len(records)} images. Give an index CSV with a column `mask`, or a folder of masks named like the images.")
    for record, path in tqdm(paired, desc="eval", unit="image", leave=False, disable=None if progress else True):
        region = store.region(record, read)
        if region is None:
            lost += 1
            continue
        truth = read_record_mask(path, record, read)
        image, _, spacing = decode(record, read)
        truth = match_size(truth, tuple(image.shape[1:]), f"the mask of {record.name}")
        region = match_size(region, tuple(image.shape[1:]), f"that of {record.name}")
        rows.append({"file": record.name, "hash": record.hashed} | image_row(truth, region, grid, tolerance=tolerance, spacing=spacing))
        groups.append(record.patient)
    if not rows:
        raise DataError(f"eval: regions must belong to these images, got none for {len(paired)} images with masks. Paths relative to IMAGES must be those that mwm localize saw.")
    source = getattr(store, "meta", {}).get("source")
    return Evaluation(tuple(rows), summarise(rows, groups, lost), grid, tolerance, source if isinstance(source, dict) else None)


def summarise(rows: Sequence[dict[str, Any]], patients: Sequence[str | None], lost: int = 0, *, rounds: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Means over the images whose mask is not empty, with intervals over patients; see `Evaluation.summary`.

    Args:
        rows: What `image_row` returns, one per image.
        patients: Patient of each image, or None.
        lost: Images without a region.
        rounds: Draws of the intervals.
        seed: Of the draws.
    """
    positive = [k for k, row in enumerate(rows) if row["roi_area"] > 0]
    known = bool(positive) and all(patients[k] is not None for k in positive)
    groups = [str(patients[k]) for k in positive] if known else None
    summary: dict[str, Any] = {name: mean_with_interval([rows[k][name] for k in positive], groups, rounds=rounds, seed=seed) for name in FIGURES}
    negatives = [row for row in rows if row["roi_area"] == 0]
    return summary | {"images": len(positive), "patients": len(set(groups)) if groups else None, "negatives": len(negatives), "lost": lost,
                      "marked_negatives": float(np.mean([row["area"] > 0 for row in negatives])) if negatives else None,
                      "empty": float(np.mean([rows[k]["area"] == 0 for k in positive])) if positive else 0.0}
