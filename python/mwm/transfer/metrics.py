"""Figures of a classifier, each with an interval over patients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Metric = Callable[[NDArray, NDArray], float]


def accuracy(truth: NDArray, probabilities: NDArray) -> float:
    """Share of right answers. truth int [N], probabilities [N, K]"""
    return float((probabilities.argmax(1) == truth).mean())


def balanced_accuracy(truth: NDArray, probabilities: NDArray) -> float:
    """Mean over the classes that occur of the share of their cases that is found. truth int [N], probabilities [N, K]"""
    predicted = probabilities.argmax(1)
    return float(np.mean([(predicted[truth == k] == k).mean() for k in np.unique(truth)]))


def macro_f1(truth: NDArray, probabilities: NDArray) -> float:
    """Mean F1 over the classes that occur in truth or prediction. truth int [N], probabilities [N, K]"""
    counts = confusion(truth, probabilities)
    named = counts.sum(0) + counts.sum(1)
    occurs = named > 0
    return float((2 * np.diag(counts)[occurs] / named[occurs]).mean())


def auroc(truth: NDArray, probabilities: NDArray) -> float:
    """Area under the ROC curve: of class 1 for two classes, else the mean over classes of one against the rest.

    Args:
        truth: int [N]
        probabilities: [N, K]

    Returns:
        NaN where fewer than two classes occur; classes that do not occur are left out of the mean.
    """
    classes = [k for k in range(probabilities.shape[1]) if (truth == k).any()]
    if len(classes) < 2:
        return float("nan")
    if probabilities.shape[1] == 2:
        return _rank_auroc(truth == 1, probabilities[:, 1])
    return float(np.mean([_rank_auroc(truth == k, probabilities[:, k]) for k in classes]))


def _rank_auroc(positive: NDArray, scores: NDArray) -> float:
    """Mann-Whitney: the chance that a positive scores above a negative, ties counting half. positive bool [N], scores [N]"""
    from scipy.stats import rankdata

    n_in, n_out = int(positive.sum()), int((~positive).sum())
    return float((rankdata(scores)[positive].sum() - n_in * (n_in + 1) / 2) / (n_in * n_out))


METRICS: dict[str, Metric] = {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy, "macro_f1": macro_f1, "auroc": auroc}


def bootstrap(metric: Metric, truth: NDArray, probabilities: NDArray, groups: Sequence[str], *, rounds: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval over resampled patients.

    Whole patients are drawn with replacement, so that images of one patient never count as independent. Draws in which
    the metric is not defined (one class only) are left out.

    Args:
        metric: (truth, probabilities) -> number.
        truth: int [N]
        probabilities: [N, K]
        groups: Patient of each image. N
        rounds: Draws.
        seed: Of the draws.

    Returns:
        Lower and upper end; NaN where no draw defines the metric, or where all images are of one patient, which tells nothing about others.
    """
    names, owner = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        return float("nan"), float("nan")
    order = np.argsort(owner, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(owner))[:-1])
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(rounds):
        chosen = np.concatenate([rows[k] for k in generator.integers(0, len(names), len(names))])
        value = metric(truth[chosen], probabilities[chosen])
        if np.isfinite(value):
            draws.append(value)
    if not draws:
        return float("nan"), float("nan")
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def confusion(truth: NDArray, probabilities: NDArray) -> NDArray:
    """Cases of class row called class column. truth int [N], probabilities [N, K] -> int64 [K, K]"""
    k = probabilities.shape[1]
    return np.bincount(truth * k + probabilities.argmax(1), minlength=k * k).reshape(k, k)


def classification_metrics(truth: NDArray, probabilities: NDArray, groups: Sequence[str] | None = None, *, rounds: int = 2000,
                           seed: int = 0) -> dict[str, Any]:
    """Accuracy, balanced accuracy, macro-F1 and AUROC with intervals, and how many images and patients they rest on.

    Args:
        truth: Class of each image. int [N]
        probabilities: [N, K]
        groups: Patient of each image; None where they are not known: then images are resampled, which makes intervals too narrow.
        rounds: Bootstrap draws.
        seed: Of the draws.

    Returns:
        `{"accuracy": {"value", "low", "high"}, …, "images": N, "patients": number or None}`; a figure that is not defined is None.

    Raises:
        ValueError: shapes do not fit, there is no image, or a class is not in [0, K).
    """
    truth, probabilities = np.asarray(truth), np.asarray(probabilities, dtype=np.float64)
    if truth.ndim != 1 or probabilities.ndim != 2 or len(truth) != len(probabilities) or not len(truth):
        raise ValueError(f"classification_metrics: truth must be [N] and probabilities [N, K] with N > 0, got {list(truth.shape)} and {list(probabilities.shape)}.")
    if groups is not None and len(groups) != len(truth):
        raise ValueError(f"classification_metrics: groups must name the patient of each of the {len(truth)} images, got {len(groups)}.")
    if not np.issubdtype(truth.dtype, np.integer) or truth.min() < 0 or truth.max() >= probabilities.shape[1]:
        raise ValueError(f"classification_metrics: truth must be whole numbers of classes in [0, K) with K = {probabilities.shape[1]}, got {truth.dtype} from {truth.min()} to "
                         f"{truth.max()}. Give the column of probabilities that is right.")
    units = [str(k) for k in range(len(truth))] if groups is None else [str(g) for g in groups]
    result: dict[str, Any] = {}
    for name, metric in METRICS.items():
        low, high = bootstrap(metric, truth, probabilities, units, rounds=rounds, seed=seed)
        numbers = {"value": metric(truth, probabilities), "low": low, "high": high}
        result[name] = {key: value if np.isfinite(value) else None for key, value in numbers.items()}
    return result | {"images": len(truth), "patients": None if groups is None else len(set(units))}
