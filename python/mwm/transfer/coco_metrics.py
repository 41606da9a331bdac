"""Average precision of detections with intervals over patients; pycocotools matches, the rest is weighted counting.

COCO's definition: detections of a class, best first, are matched to objects at ten IoU thresholds 0.5 … 0.95; precision is made
monotone and averaged over 101 recall points, then over classes and thresholds. An image's matches do not depend on other images,
so a bootstrap draw only changes how often each image counts: matching is done once.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar")
HINT = "finetune: detection must have pycocotools, got none. Install it with `pip install 'mwm[detect]'` or `pip install pycocotools`."


@dataclass(frozen=True)
class Matches:
    """Detections of one class and one range of areas, best first, as far as counting needs them: none after the last that found an object.

    Attributes:
        image: Image of each detection. int64 [D]
        hit: Whether it found an object, at each threshold. bool [10, D]
        counts: False where it is ignored (matched to a crowd, or of another size). bool [10, D]
        objects: Objects of this class and size in each image. int64 [I]
    """

    image: NDArray
    hit: NDArray
    counts: NDArray
    objects: NDArray


def pycocotools() -> Any:
    """The package's modules `coco`, `cocoeval` and `mask`, loaded on first use.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        import pycocotools.coco
        import pycocotools.cocoeval
        import pycocotools.mask
    except ModuleNotFoundError as error:
        raise ImportError(HINT) from error
    return pycocotools


def match(truth: dict[str, Any], detections: Sequence[dict[str, Any]], kind: str, *, areas: Sequence[str] = tuple(AREAS)) -> list[list[Matches]]:
    """Match detections to objects with pycocotools.

    Args:
        truth: A COCO data set: images, annotations, categories.
        detections: COCO results: image_id, category_id, score, and bbox (x, y, w, h) or segmentation (RLE).
        kind: "bbox" or "segm".
        areas: Names of `AREAS`.

    Returns:
        Matches by class (in the order of category ids) and by area; images are numbered in the order of their ids.
    """
    package = pycocotools()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        # Both sides are copied: pycocotools writes into what it is given.
        gt = package.coco.COCO()
        gt.dataset = {key: [dict(row) for row in truth[key]] for key in ("images", "annotations", "categories")}
        gt.createIndex()
        results = [{key: row[key] for key in ("image_id", "category_id", "score", "bbox" if kind == "bbox" else "segmentation")} for row in detections]
        if results:
            dt = gt.loadRes(results)
        else:
            dt = package.coco.COCO()
            dt.dataset = {"images": gt.dataset["images"], "annotations": [], "categories": gt.dataset["categories"]}
            dt.createIndex()
        judge = package.cocoeval.COCOeval(gt, dt, kind)
        judge.params.areaRng, judge.params.areaRngLbl = [list(AREAS[name]) for name in areas], list(areas)
        judge.params.iouThrs, judge.params.maxDets = THRESHOLDS, [100]
        judge.evaluate()
    images, classes = len(judge.params.imgIds), len(judge.params.catIds)
    rows = iter(judge.evalImgs)
    return [[_collect([next(rows) for _ in range(images)]) for _ in areas] for _ in range(classes)]


def _collect(cells: list[dict[str, Any] | None]) -> Matches:
    scores, image, hit, counts = [np.zeros(0)], [np.zeros(0, np.int64)], [np.zeros((10, 0), bool)], [np.zeros((10, 0), bool)]
    objects = np.zeros(len(cells), np.int64)
    for k, cell in enumerate(cells):
        if cell is None:
            continue
        objects[k] = int(np.sum(np.asarray(cell["gtIgnore"]) == 0))
        scores.append(np.asarray(cell["dtScores"], np.float64))
        image.append(np.full(len(cell["dtScores"]), k))
        hit.append(np.asarray(cell["dtMatches"]).reshape(10, -1) > 0)
        counts.append(~np.asarray(cell["dtIgnore"], bool).reshape(10, -1))
    order = np.argsort(-np.concatenate(scores), kind="mergesort")
    held, counted = np.concatenate(hit, 1)[:, order], np.concatenate(counts, 1)[:, order]
    # What is ignored everywhere counts nowhere, and what comes after the last hit only lowers a precision that no recall point reads.
    used = np.flatnonzero(counted.any(0))
    used = used[: 1 + max(np.flatnonzero((held & counted)[:, used].any(0)), default=-1)]
    return Matches(np.concatenate(image)[order][used], held[:, used], counted[:, used], objects)


def average_precision(matches: Matches, weights: NDArray | None = None) -> tuple[NDArray, NDArray]:
    """Average precision and highest recall at each threshold.

    Args:
        matches: Of one class and area.
        weights: How often each image counts, whole numbers; None for once. [I]

    Returns:
        float64 [10] each; NaN where there is no object.
    """
    weights = np.ones(len(matches.objects)) if weights is None else np.asarray(weights, np.float64)
    objects = float((weights * matches.objects).sum())
    if not objects:
        return np.full(10, np.nan), np.full(10, np.nan)
    each = weights[matches.image]
    values, recall, upto = np.zeros(10), np.zeros(10), np.zeros(0)
    for t in range(10):
        if not t or not np.array_equal(matches.counts[t], matches.counts[t - 1]):
            upto = np.cumsum(matches.counts[t] * each)
        # Recall rises, and precision peaks, at detections that found an object: only those are looked at, in every one of thousands of draws.
        at = np.flatnonzero(matches.hit[t] & matches.counts[t] & (each > 0))
        if not len(at):
            continue
        found, shown = np.cumsum(each[at]), upto[at]
        envelope = np.maximum.accumulate((found / (shown + np.spacing(1)))[::-1])[::-1]
        reached = np.searchsorted(found / objects, RECALLS, side="left")
        values[t] = envelope[reached[reached < len(at)]].sum() / len(RECALLS)
        recall[t] = found[-1] / objects
    return values, recall


def figures(table: list[list[Matches]], weights: NDArray | None = None) -> NDArray:
    """The figures of `FIGURES` over all classes. -> float64 [7], NaN where not defined

    Args:
        table: From `match`, with all areas.
        weights: How often each image counts. [I]
    """
    cells = [[average_precision(cell, weights) for cell in row] for row in table]
    ap = np.array([[cell[0] for cell in row] for row in cells])  # [class, area, threshold]
    recall = np.array([row[0][1] for row in cells])
    mean = lambda values: float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")  # noqa: E731
    return np.array([mean(ap[:, 0]), mean(ap[:, 0, 0]), mean(ap[:, 0, 5]), *(mean(ap[:, a]) for a in (1, 2, 3)), mean(recall)])


def detection_metrics(truth: dict[str, Any], detections: Sequence[dict[str, Any]], groups: Sequence[str] | None = None, *, masks: bool, rounds: int = 2000,
                      seed: int = 0) -> dict[str, Any]:
    """Box and mask AP with 95 % percentile intervals over resampled patients.

    Args:
        truth: COCO data set.
        detections: COCO results with bbox, and segmentation where `masks`.
        groups: Patient of each image, in the order of the image ids; None where they are not known: then images are resampled.
        masks: Whether to judge masks too.
        rounds: Bootstrap draws.
        seed: Of the draws.

    Returns:
        `{"box_ap": {"value", "low", "high"}, …, "mask_ap": …, "box_ap_by_class": {name: value}, "images", "patients", "objects"}`; a figure that is
        not defined (no object of that size; an interval of a single patient) is None. Sizes are areas in pixels of the stored image: small < 32², large > 96².

    Raises:
        ValueError: there is no image, or groups do not fit.
    """
    count = len(truth["images"])
    if not count:
        raise ValueError("detection_metrics: truth must hold images, got none.")
    if groups is not None and len(groups) != count:
        raise ValueError(f"detection_metrics: groups must name the patient of each of the {count} images, got {len(groups)}.")
    units = [str(k) for k in range(count)] if groups is None else [str(g) for g in groups]
    names, owner = np.unique(np.asarray(units), return_inverse=True)
    generator = np.random.default_rng(seed)
    # One list of draws for boxes and masks, so that both intervals speak of the same patients.
    draws = [np.bincount(generator.integers(0, len(names), len(names)), minlength=len(names))[owner] for _ in range(rounds)]
    classes = [row["name"] for row in sorted(truth["categories"], key=lambda row: row["id"])]
    result: dict[str, Any] = {}
    for kind, prefix in (("bbox", "box"), ("segm", "mask"))[: 2 if masks else 1]:
        table = match(truth, detections, kind)
        values, sampled = figures(table), np.array([figures(table, weights) for weights in draws])
        for k, name in enumerate(FIGURES):
            defined = sampled[np.isfinite(sampled[:, k]), k]
            low, high = np.quantile(defined, (0.025, 0.975)) if len(defined) and np.isfinite(values[k]) and len(names) > 1 else (np.nan, np.nan)
            result[f"{prefix}_{name}"] = {key: float(v) if np.isfinite(v) else None for key, v in (("value", values[k]), ("low", low), ("high", high))}
        by_class = [average_precision(row[0])[0].mean() for row in table]
        result[f"{prefix}_ap_by_class"] = {name: float(v) if np.isfinite(v) else None for name, v in zip(classes, by_class, strict=True)}
    objects = sum(not row.get("iscrowd", 0) for row in truth["annotations"])
    return result | {"images": count, "patients": None if groups is None else len(names), "objects": objects}
