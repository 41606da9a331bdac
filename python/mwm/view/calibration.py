"""Calibration: whether a classifier is right as often as it says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mwm.view.chart import Chart
from mwm.view.pixels import to_array
from mwm.view.roc import _LEFT, _SIDE, _TOP, square

_BARS = 64


@dataclass(frozen=True)
class Reliability:
    """Answers by how sure they were.

    Attributes:
        confidence: mean probability of the answer in each bin; NaN where it is empty. [bins]
        accuracy: share of right answers in it. [bins]
        counts: answers in it. int64 [bins]
        error: expected calibration error: mean over all answers of |accuracy - confidence| of their bin.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    counts: np.ndarray
    error: float


def reliability(truth: object, probabilities: object, *, bins: int = 10) -> Reliability:
    """Sort answers into bins of equal width by the probability of the class that was called (Guo et al., ICML 2017).

    Args:
        truth: int [N]
        probabilities: [N, K]
        bins: of (0, 1]; a probability on an edge belongs to the bin below it.

    Raises:
        ValueError: there is no answer, or shapes do not fit.
    """
    truth, probabilities = to_array(truth).astype(int), to_array(probabilities).astype(float)
    if probabilities.ndim != 2 or len(truth) != len(probabilities) or not len(truth):
        raise ValueError(f"reliability: probabilities must be [N, K] with N = {len(truth)} > 0 (truth), got {list(probabilities.shape)}.")
    sure, right = probabilities.max(1), probabilities.argmax(1) == truth
    home = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(home, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(home, sure, minlength=bins) / counts
        accuracy = np.bincount(home, right, minlength=bins) / counts
    gaps = np.abs(np.nan_to_num(accuracy) - np.nan_to_num(confidence))
    return Reliability(confidence, accuracy, counts, float((gaps * counts).sum() / counts.sum()))


def calibration_chart(truth: object, probabilities: object, *, bins: int = 10) -> Chart:
    """Share of right answers over their probability, with 95 % Wilson intervals; below, how many answers lie in each bin.

    Args:
        truth: int [N]
        probabilities: [N, K]
        bins: of equal width.
    """
    found = reliability(truth, probabilities, bins=bins)
    chart = Chart(_LEFT + _SIDE + 40, _TOP + _SIDE + 60 + _BARS + 74, "calibration")
    square(chart, "probability of the class that was called", "share of right answers")
    at = lambda x, y: (_LEFT + _SIDE * x, _TOP + _SIDE * (1 - y))  # noqa: E731
    filled = np.flatnonzero(found.counts)
    chart.line([at(found.confidence[k], found.accuracy[k]) for k in filled], "s0", 2.0, 0.5)
    for k in filled:
        low, high = _wilson(found.accuracy[k], found.counts[k])
        chart.line([at(found.confidence[k], low), at(found.confidence[k], high)], "s0", 2.4, 0.4)
        chart.dot(*at(found.confidence[k], found.accuracy[k]), 5, "s0")
    floor = _TOP + _SIDE + 60 + _BARS
    for k in filled:
        tall = _BARS * found.counts[k] / found.counts.max()
        chart.box(_LEFT + _SIDE * k / bins + 2, floor - tall, _SIDE / bins - 4, tall, "s4", 0.7)
        chart.text(_LEFT + _SIDE * (k + 0.5) / bins, floor + 10, str(found.counts[k]), anchor="middle", size=11)
    chart.text(_LEFT, floor + 38, f"expected calibration error {found.error:.3f}; {found.counts.sum()} images", colour="ink")
    chart.text(_LEFT, floor + 58, "lines: 95 % Wilson intervals, which take images as independent", size=12)
    return chart


def _wilson(share: float, count: int) -> tuple[float, float]:
    """95 % score interval of a share of `count` cases."""
    z2 = 1.96**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = 1.96 * np.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return middle - half, middle + half
