"""What the regions of a run are like: size, parts, how spread the maps are, how well text and image agree; as numbers and as lines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from torch import Tensor

from mwm.data import blob

FILE = "report.json"
_NEIGHBOURS = np.ones((3, 3), dtype=bool)


class RegionReport:
    """Collects figures region by region; nothing in it names a file.

    Figures of maps (entropy, similarity) exist only for those that were computed by this run, not for regions found in the cache.
    """

    def __init__(self) -> None:
        self._area: list[float] = []
        self._parts: list[int] = []
        self._entropy: list[float] = []
        self._similarity: list[float] = []
        self._full = 0

    def add(self, region: Tensor, heat: Tensor | None = None, similarity: float | Tensor | None = None) -> None:
        """Count one region.

        Args:
            region: float [H, W] in [0, 1].
            heat: The map it was made from, where it was computed now. float [H, W]
            similarity: Cosine of image and text, where the localizer tells it.
        """
        values = np.asarray(region.detach().cpu(), dtype=np.float32)
        self._area.append(float(values.mean()) if values.size else 0.0)
        self._full += bool(values.size) and bool((values > 0).all())
        self._parts.append(int(ndimage.label(values >= 0.5, structure=_NEIGHBOURS)[1]) if self._area[-1] else 0)
        if heat is not None:
            self._entropy.append(entropy(heat))
        if similarity is not None and math.isfinite(float(similarity)):
            self._similarity.append(float(similarity))

    def merge(self, other: RegionReport) -> None:
        """Take over what another process counted."""
        self._area += other._area
        self._parts += other._parts
        self._entropy += other._entropy
        self._similarity += other._similarity
        self._full += other._full

    def to_dict(self) -> dict[str, Any]:
        """Plain values: `images`, `empty` and `full` (numbers of images), `share_empty`, `share_full`, and under `area` (share of the image, of the non-empty
        regions), `components`, `entropy` (of the maps, 0 = one pixel, 1 = evenly spread) and `similarity` the number of values, mean and quantiles."""
        empty = sum(area == 0 for area in self._area)
        count = max(1, len(self._area))
        return {
            "images": len(self._area), "empty": empty, "full": self._full, "share_empty": empty / count, "share_full": self._full / count,
            "area": _summary([area for area in self._area if area > 0]),
            "components": _summary([parts for parts in self._parts if parts]),
            "entropy": _summary([value for value in self._entropy if value == value]),
            "similarity": _summary(self._similarity),
        }

    def __str__(self) -> str:
        told = self.to_dict()
        lines = []
        if told["area"]["values"]:
            shown = (("low", "(5th percentile)"), ("median", "(median)"), ("high", "(95th)"))
            lines.append("area: " + ", ".join(f"{100 * told['area'][name]:.1f} % {words}" for name, words in shown))
            lines.append(f"parts: {told['components']['mean']:.1f} a region on average")
        if told["entropy"]["values"]:
            lines.append(f"maps: entropy {told['entropy']['mean']:.2f} (0 = one pixel, 1 = evenly spread), of {told['entropy']['values']} computed now")
        if told["similarity"]["values"]:
            lines.append(f"text and image: cosine {told['similarity']['mean']:.3f} on average ({told['similarity']['low']:.3f} … {told['similarity']['high']:.3f})")
        if told["share_empty"] >= 0.2:
            lines.append(f"warning: {told['empty']} of {told['images']} regions are empty; such images are masked like the mean one. Lower --threshold, or reword the prompt.")
        return "\n".join(lines)

    def write(self, folder: str | Path, **more: Any) -> Path:
        """Write `report.json` into the folder of the regions, with further plain values (for example the check's verdict)."""
        path = Path(folder) / FILE
        blob.write_bytes(path, (json.dumps(self.to_dict() | more, indent=1) + "\n").encode())
        return path


def entropy(heat: Tensor) -> float:
    """Shannon entropy of a map read as a distribution over its pixels, divided by that of an even one; NaN for a map without mass. float [H, W]"""
    values = np.asarray(heat.detach().cpu(), dtype=np.float64).clip(0).ravel()
    total = values.sum()
    if values.size < 2 or not total > 0:
        return math.nan
    p = values[values > 0] / total
    return float(-(p * np.log(p)).sum() / math.log(values.size)) + 0.0


def _summary(values: list[float] | list[int]) -> dict[str, Any]:
    """Number of values, mean, median, 5th and 95th percentile; None where there are none."""
    if not values:
        return {"values": 0, "mean": None, "median": None, "low": None, "high": None}
    low, median, high = np.quantile(np.asarray(values, np.float64), (0.05, 0.5, 0.95))
    return {"values": len(values), "mean": float(np.mean(values)), "median": float(median), "low": float(low), "high": float(high)}
