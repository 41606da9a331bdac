"""How well a mask agrees with the truth: per image, and as means with intervals over patients.

Conventions for empty masks (P prediction, T truth), chosen so that every image has a finite value:

| case               | Dice, IoU, NSD | HD95                                 | pointing      |
|--------------------|----------------|--------------------------------------|---------------|
| both empty         | 1              | 0                                    | not defined   |
| one of them empty  | 0              | diagonal of the image (the worst)    | 0 or 1, by T; not defined where T is empty |

The surface of a mask is made of its pixels that touch (by an edge) a pixel outside of it; what lies beyond the image counts as outside.
Distances run between centres of such pixels: exact Euclidean, through scipy's distance transform. Dice: Dice 1945; normalised surface
Dice: Nikolov et al. 2018 (arXiv 1809.04430), here with pixels counted instead of lengths; HD95: the larger of the two directed 95th percentiles;
pointing game: Zhang et al. 2016 (arXiv 1608.00507).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FIGURES = ("dice", "iou", "nsd", "hd95")
"""Names of the figures of one pair of masks, in the order of tables."""


def dice(truth: NDArray, predicted: NDArray) -> float:
    """2 |T ∩ P| / (|T| + |P|); 1 where both are empty. bool [H, W] each"""
    truth, predicted = _pair("dice", truth, predicted)
    total = int(truth.sum()) + int(predicted.sum())
    return 1.0 if total == 0 else 2 * int((truth & predicted).sum()) / total


def iou(truth: NDArray, predicted: NDArray) -> float:
    """|T ∩ P| / |T ∪ P|; 1 where both are empty. bool [H, W] each"""
    truth, predicted = _pair("iou", truth, predicted)
    union = int((truth | predicted).sum())
    return 1.0 if union == 0 else int((truth & predicted).sum()) / union


def surface(mask: NDArray) -> NDArray:
    """Pixels of the mask that touch, by an edge, a pixel outside of it or the border of the image. bool [H, W] -> bool [H, W]"""
    inside = np.pad(np.asarray(mask, bool), 1)
    core = inside[1:-1, 1:-1]
    return core & ~(inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:])


def surface_distances(truth: NDArray, predicted: NDArray, spacing: tuple[float, float] = (1.0, 1.0)) -> tuple[NDArray, NDArray]:
    """Distance of every surface pixel of one mask to the nearest surface pixel of the other.

    Args:
        truth: bool [H, W], not empty.
        predicted: bool [H, W], not empty.
        spacing: Height and width of a pixel, in the unit of the result.

    Returns:
        From truth to prediction [S_T], and from prediction to truth [S_P], float64 in the unit of `spacing`.

    Raises:
        ValueError: shapes differ, a mask is empty, or the spacing is not positive.
    """
    from scipy.ndimage import distance_transform_edt

    truth, predicted = _pair("surface_distances", truth, predicted)
    if not truth.any() or not predicted.any():
        raise ValueError("surface_distances: masks must not be empty, got an empty one. Its distance to anything is not defined.")
    if len(spacing) != 2 or not all(math.isfinite(edge) and edge > 0 for edge in spacing):
        raise ValueError(f"surface_distances: spacing must be two positive numbers, got {tuple(spacing)}.")
    both = truth | predicted
    rows, columns = np.flatnonzero(both.any(1)), np.flatnonzero(both.any(0))
    # Both surfaces lie in the box of the union, so that distances inside it are exact; the frame of one pixel keeps the border of the mask a border.
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    edge_t, edge_p = surface(truth[box]), surface(predicted[box])
    to_p = distance_transform_edt(~edge_p, sampling=spacing)
    to_t = distance_transform_edt(~edge_t, sampling=spacing)
    return to_p[edge_t], to_t[edge_p]


def nsd(truth: NDArray, predicted: NDArray, tolerance: float, spacing: tuple[float, float] = (1.0, 1.0)) -> float:
    """Normalised surface Dice: the share of both surfaces that lies within `tolerance` of the other.

    Args:
        truth: bool [H, W]
        predicted: bool [H, W]
        tolerance: In the unit of `spacing`; a distance equal to it counts as within.
        spacing: Height and width of a pixel.
    """
    return pair_figures(truth, predicted, tolerance=tolerance, spacing=spacing)["nsd"]


def hd95(truth: NDArray, predicted: NDArray, spacing: tuple[float, float] = (1.0, 1.0)) -> float:
    """The larger of the 95th percentiles of the distances from one surface to the other, in the unit of `spacing`. bool [H, W] each"""
    return pair_figures(truth, predicted, tolerance=0.0, spacing=spacing)["hd95"]


def pair_figures(truth: NDArray, predicted: NDArray, *, tolerance: float, spacing: tuple[float, float] = (1.0, 1.0)) -> dict[str, float]:
    """All figures of one pair of masks, with one distance transform per side.

    Args:
        truth: bool [H, W]
        predicted: bool [H, W]
        tolerance: Of the surface Dice, in the unit of `spacing`.
        spacing: Height and width of a pixel: (1, 1) for pixels, or millimetres.

    Returns:
        `dice`, `iou`, `nsd` in [0, 1], and `hd95` in the unit of `spacing`; see the table at the head of the file for empty masks.

    Raises:
        ValueError: shapes differ, or the tolerance is negative.
    """
    truth, predicted = _pair("pair_figures", truth, predicted)
    if not tolerance >= 0:
        raise ValueError(f"pair_figures: tolerance must be 0 or more, got {tolerance}.")
    result = {"dice": dice(truth, predicted), "iou": iou(truth, predicted)}
    if not truth.any() and not predicted.any():
        return result | {"nsd": 1.0, "hd95": 0.0}
    if not truth.any() or not predicted.any():
        return result | {"nsd": 0.0, "hd95": math.hypot(truth.shape[0] * spacing[0], truth.shape[1] * spacing[1])}
    to_p, to_t = surface_distances(truth, predicted, spacing)
    near = int((to_p <= tolerance).sum()) + int((to_t <= tolerance).sum())
    return result | {"nsd": near / (to_p.size + to_t.size), "hd95": float(max(np.percentile(to_p, 95), np.percentile(to_t, 95)))}


def pointing_hit(truth: NDArray, scores: NDArray, *, tolerance: float = 0.0) -> float:
    """Whether the highest score lies in the mask (pointing game).

    Args:
        truth: bool [H, W]
        scores: Real numbers, any range. [H, W]
        tolerance: Pixels by which the point may miss the mask (15 in the paper, on photographs).

    Returns:
        1 or 0; with several highest pixels the share of them that hit; NaN where the truth is empty.

    Raises:
        ValueError: shapes differ, or a score is NaN.
    """
    truth, scores = np.asarray(truth, bool), np.asarray(scores)
    if truth.ndim != 2 or truth.shape != scores.shape:
        raise ValueError(f"pointing_hit: scores must have the shape of truth [H, W], got {list(scores.shape)} and {list(truth.shape)}.")
    if np.isnan(scores).any():
        raise ValueError("pointing_hit: scores must be numbers, got NaN.")
    if not truth.any():
        return math.nan
    if tolerance > 0:
        from scipy.ndimage import distance_transform_edt

        truth = distance_transform_edt(~truth) <= tolerance
    return float(truth[scores == scores.max()].mean())


def image_figures(truth: NDArray, predicted: NDArray, classes: int, *, tolerance: float, spacing: tuple[float, float] = (1.0, 1.0)) -> dict[str, Any]:
    """Figures of one image with one or more foreground classes.

    Args:
        truth: 0 = background, k = class k. int [H, W]
        predicted: The same. int [H, W]
        classes: Number of foreground classes.
        tolerance: Of the surface Dice.
        spacing: Height and width of a pixel.

    Returns:
        Each figure as the mean over the classes that occur in truth or prediction (as of two empty masks where none does), and under `by_class`
        the figures of each class, None for one that does not occur in either.
    """
    by_class: list[dict[str, float] | None] = []
    for k in range(1, classes + 1):
        here, there = truth == k, predicted == k
        by_class.append(pair_figures(here, there, tolerance=tolerance, spacing=spacing) if here.any() or there.any() else None)
    occurring = [figures for figures in by_class if figures is not None] or [{"dice": 1.0, "iou": 1.0, "nsd": 1.0, "hd95": 0.0}]
    return {name: float(np.mean([figures[name] for figures in occurring])) for name in FIGURES} | {"by_class": by_class}


def mean_with_interval(values: Sequence[float] | NDArray, groups: Sequence[str] | None = None, *, rounds: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Mean over images and its 95 % percentile interval over resampled patients.

    Whole patients are drawn with replacement; the mean of a draw is over the images of the drawn patients. Values that are NaN are left out.

    Args:
        values: One per image. [N]
        groups: Patient of each image; None counts every image as one. N
        rounds: Draws.
        seed: Of the draws.

    Returns:
        `value`, `low`, `high` (None where not defined: no value, or an interval of a single patient), `images` and `patients` (None where not
        known) that they rest on.

    Raises:
        ValueError: the number of groups differs.
    """
    values = np.asarray(values, np.float64)
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"mean_with_interval: groups must name the patient of each of the {len(values)} images, got {len(groups)}.")
    kept = ~np.isnan(values)
    units = np.array([str(k) for k in range(len(values))] if groups is None else [str(g) for g in groups], dtype=object)[kept]
    values = values[kept]
    if not len(values):
        return {"value": None, "low": None, "high": None, "images": 0, "patients": None if groups is None else 0}
    names, owner = np.unique(units.astype(str), return_inverse=True)
    result = {"value": float(values.mean()), "low": None, "high": None, "images": len(values), "patients": None if groups is None else len(names)}
    if len(names) < 2:
        return result
    sums, counts = np.bincount(owner, values), np.bincount(owner)
    generator = np.random.default_rng(seed)
    # Draws in the order of mwm.transfer.metrics.bootstrap, so that one seed means the same patients for every figure.
    draws = np.empty(rounds)
    for k in range(rounds):
        chosen = generator.integers(0, len(names), len(names))
        draws[k] = sums[chosen].sum() / counts[chosen].sum()
    low, high = np.quantile(draws, (0.025, 0.975))
    return result | {"low": float(low), "high": float(high)}


def mask_summary(rows: Sequence[Mapping[str, Any]], classes: Sequence[str], groups: Sequence[str] | None = None, *, rounds: int = 2000,
                 seed: int = 0) -> dict[str, Any]:
    """Means over images with intervals over patients, of all images and of those with something to find.

    Args:
        rows: Per image what `image_figures` returns, and `pointing` and `truth_pixels`.
        classes: Names of the foreground classes.
        groups: Patient of each image, or None.
        rounds: Draws of the intervals.
        seed: Of the draws.

    Returns:
        A figure per name; `dice_positive` over images whose truth is not empty; `negatives` and the share of them that are marked nevertheless;
        `by_class` with the Dice of each class over the images where it occurs in truth or prediction (only for several classes).
    """
    def mean(values: Sequence[float]) -> dict[str, Any]:
        return mean_with_interval(values, groups, rounds=rounds, seed=seed)

    positive = np.array([row["truth_pixels"] > 0 for row in rows], bool)
    result: dict[str, Any] = {name: mean([row[name] for row in rows]) for name in FIGURES}
    result["pointing"] = mean([row["pointing"] for row in rows])
    result["dice_positive"] = mean([row["dice"] if p else math.nan for row, p in zip(rows, positive, strict=True)])
    result["marked_negatives"] = mean([math.nan if p else float(row["predicted_pixels"] > 0) for row, p in zip(rows, positive, strict=True)])
    if len(classes) > 1:
        result["by_class"] = {name: mean([math.nan if row["by_class"][k] is None else row["by_class"][k]["dice"] for row in rows])
                              for k, name in enumerate(classes)}
    return result | {"images": len(rows), "positives": int(positive.sum()), "patients": None if groups is None else len(set(map(str, groups)))}


def _pair(op: str, truth: NDArray, predicted: NDArray) -> tuple[NDArray, NDArray]:
    truth, predicted = np.asarray(truth, bool), np.asarray(predicted, bool)
    if truth.ndim != 2 or truth.shape != predicted.shape or not truth.size:
        raise ValueError(f"{op}: predicted must have the shape of truth [H, W], got {list(predicted.shape)} and {list(truth.shape)}.")
    return truth, predicted
