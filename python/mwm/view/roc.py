"""Receiver operating characteristic: the true positives that each rate of false alarms buys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mwm.view.chart import Chart, labels, ticks
from mwm.view.pixels import to_array

_LEFT, _TOP, _SIDE = 62, 34, 400


def roc_points(positive: object, scores: object) -> tuple[np.ndarray, np.ndarray]:
    """Rates at every threshold, from none called positive to all.

    Args:
        positive: bool [N]
        scores: higher means positive. [N]

    Returns:
        False-positive and true-positive rate, float64 [M], both from 0 to 1; equal scores change together.
    """
    positive, scores = to_array(positive).astype(bool), to_array(scores).astype(float)
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = np.cumsum(positive[order])[last]
    alarms = last + 1 - hits
    return np.append(0, alarms / max(1, (~positive).sum())), np.append(0, hits / max(1, positive.sum()))


def roc_chart(truth: object, probabilities: object, classes: Sequence[str], *, notes: Sequence[str] = ()) -> Chart:
    """One curve per class against the rest; for two classes the curve of the second.

    Args:
        truth: int [N]
        probabilities: [N, K]
        classes: K names.
        notes: text behind each curve's name in the legend, such as its area; empty for none.

    Raises:
        ValueError: shapes do not fit, or fewer than two classes occur.
    """
    truth, probabilities = to_array(truth).astype(int), to_array(probabilities).astype(float)
    if probabilities.ndim != 2 or probabilities.shape != (len(truth), len(classes)):
        raise ValueError(f"roc_chart: probabilities must be [N, K] with N = {len(truth)} (truth) and K = {len(classes)} (classes), got {list(probabilities.shape)}.")
    shown = [k for k in ([1] if len(classes) == 2 else range(len(classes))) if 0 < (truth == k).sum() < len(truth)]
    if not shown:
        raise ValueError("roc_chart: truth must hold at least two classes, got one. A curve needs positives and negatives.")
    height = _TOP + _SIDE + 56 + 24 * len(shown)
    chart = Chart(_LEFT + _SIDE + 40, height, "receiver operating characteristic")
    square(chart, "false-positive rate", "true-positive rate")
    for row, k in enumerate(shown):
        x, y = roc_points(truth == k, probabilities[:, k])
        colour = f"s{row % 5}"
        chart.line([(_LEFT + _SIDE * a, _TOP + _SIDE * (1 - b)) for a, b in zip(x, y, strict=True)], colour, 2.2)
        top = _TOP + _SIDE + 64 + 24 * row
        chart.box(_LEFT, top - 3, 18, 5, colour)
        note = notes[k] if k < len(notes) else ""
        chart.text(_LEFT + 28, top, f"{classes[k]}{'' if len(classes) == 2 else ' against the rest'}{f': {note}' if note else ''}", colour="ink")
    return chart


def square(chart: Chart, x_label: str, y_label: str) -> None:
    """Axes from 0 to 1 with the diagonal, for curves of rates; the plot is `_SIDE` units wide."""
    marks = ticks(0, 1)
    for value, words in zip(marks, labels(marks), strict=True):
        x, y = _LEFT + _SIDE * value, _TOP + _SIDE * (1 - value)
        chart.line([(_LEFT, y), (_LEFT + _SIDE, y)], "line")
        chart.line([(x, _TOP), (x, _TOP + _SIDE)], "line")
        chart.text(_LEFT - 8, y, words, anchor="end", size=12)
        chart.text(x, _TOP + _SIDE + 16, words, anchor="middle", size=12)
    chart.line([(_LEFT, _TOP + _SIDE), (_LEFT + _SIDE, _TOP)], "muted", 1.0, 0.6)
    chart.text(_LEFT, 14, y_label)
    chart.text(_LEFT + _SIDE, _TOP + _SIDE + 38, x_label, anchor="end")
