"""The three charts of a run: curves over steps, values with intervals, shares as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mwm.view.chart import Chart, labels, ticks
from mwm.view.pixels import to_array

_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 34, 46


def loss_curve(series: Mapping[str, tuple[object, object]], *, x_label: str = "step", y_label: str = "loss", width: int = 760,
               height: int = 300, smooth: int = 0) -> Chart:
    """Curves over steps.

    Args:
        series: name to (steps [N], values [N]); values that are not finite are left out.
        smooth: width in points of a running median that is drawn strongly over the pale raw curve; 0 draws the raw curve alone.

    Raises:
        ValueError: there is no finite point at all.
    """
    cleaned = {}
    for name, (steps, values) in series.items():
        steps, values = to_array(steps).astype(float), to_array(values).astype(float)
        keep = np.isfinite(values)
        if keep.any():
            cleaned[name] = (steps[keep], values[keep])
    if not cleaned:
        raise ValueError("loss_curve: series must hold at least one finite value, got none. Check that training ran at least one step.")
    x_low, x_high = min(x.min() for x, _ in cleaned.values()), max(x.max() for x, _ in cleaned.values())
    everything = np.concatenate([y for _, y in cleaned.values()])
    y_low, y_high = float(everything.min()), float(np.quantile(everything, 0.995))
    pad = max(0.06 * (y_high - y_low), 1e-3 * max(abs(y_high), 1e-6))
    y_low, y_high = y_low - pad, max(y_high, y_low) + pad
    chart = Chart(width, height, f"{y_label} over {x_label}")
    inner_width, inner_height = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return (_LEFT + inner_width * (x - x_low) / max(x_high - x_low, 1e-12),
                _TOP + inner_height * (1 - (min(max(y, y_low), y_high) - y_low) / (y_high - y_low)))

    marks = ticks(y_low, y_high)
    for tick, words in zip(marks, labels(marks), strict=True):
        _, y = at(x_low, tick)
        chart.line([(_LEFT, y), (width - _RIGHT, y)], "line")
        chart.text(_LEFT - 8, y, words, anchor="end", size=12)
    marks = ticks(x_low, x_high, 6)
    for tick, words in zip(marks, labels(marks), strict=True):
        x, _ = at(tick, y_low)
        chart.text(x, height - _BOTTOM + 16, words, anchor="middle", size=12)
    chart.text((_LEFT + width - _RIGHT) / 2, height - 9, x_label, anchor="middle")
    left = _LEFT
    for k, (name, (x, y)) in enumerate(cleaned.items()):
        colour = f"s{k % 5}"
        raw = [at(*point) for point in zip(x, y, strict=True)]
        if smooth > 1 and len(y) > 2 * smooth:
            chart.line(raw, colour, 1.0, 0.28)
            middle = [float(np.median(y[max(0, i - smooth // 2) : i + smooth // 2 + 1])) for i in range(len(y))]
            chart.line([at(*point) for point in zip(x, middle, strict=True)], colour, 2.2)
        else:
            chart.line(raw, colour, 2.0)
            if len(raw) == 1:
                chart.dot(*raw[0], 3, colour)
        chart.box(left, 11, 14, 4, colour)
        chart.text(left + 20, 13, name, colour="ink")
        left += 38 + 7.2 * len(name)
    if len(cleaned) == 1 and not next(iter(cleaned)):
        chart.shapes = [s for s in chart.shapes if s[0] != "box"]
    return chart


def interval_chart(rows: Sequence[tuple[str, float, float, float, str]], *, x_label: str, reference: tuple[float, str] | None = None,
                   limits: tuple[float, float] | None = None, width: int = 760) -> Chart:
    """Values with intervals, one per line.

    Args:
        rows: (name, value, low end, high end, note at the right).
        reference: (value, name) of a vertical line, such as chance.
        limits: ends of the axis; from the data when left out.
    """
    row_height, left, right = 40, 190, 132
    height = 24 + row_height * len(rows) + 50
    values = [v for _, value, low, high, _ in rows for v in (value, low, high)] + ([reference[0]] if reference else [])
    low, high = limits or (min(values) - 0.04, max(values) + 0.04)
    chart = Chart(width, height, x_label)

    def at(value: float) -> float:
        return left + (width - left - right) * (value - low) / max(high - low, 1e-12)

    bottom = 24 + row_height * len(rows)
    marks = ticks(low, high)
    for tick, words in zip(marks, labels(marks), strict=True):
        chart.line([(at(tick), 24), (at(tick), bottom)], "line")
        chart.text(at(tick), bottom + 15, words, anchor="middle", size=12)
    if reference:
        chart.line([(at(reference[0]), 20), (at(reference[0]), bottom)], "muted", 1.4)
        chart.text(at(reference[0]), 11, reference[1], anchor="middle", size=12)
    for k, (name, value, first, last, note) in enumerate(rows):
        y, colour = 24 + row_height * (k + 0.5), f"s{k % 5}"
        chart.text(0, y, name, colour="ink")
        chart.line([(at(first), y), (at(last), y)], colour, 2.4, 0.55)
        for end in (first, last):
            chart.line([(at(end), y - 5), (at(end), y + 5)], colour, 2.0, 0.55)
        chart.dot(at(value), y, 6, colour)
        chart.text(width, y, note, colour="ink", anchor="end")
    chart.text((left + width - right) / 2, height - 9, x_label, anchor="middle")
    return chart


def share_bars(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, x_label: str = "share of patches hidden", width: int = 760) -> Chart:
    """Shares in [0, 1] as bars: (group, [(name, share), ...]); a share that does not exist (NaN) is written as a dash."""
    bar, gap, left, right = 18, 16, 250, 60
    height = 10 + sum(len(bars) * (bar + 4) + gap for _, bars in rows) + 36
    chart = Chart(width, height, x_label)
    names = list(dict.fromkeys(name for _, bars in rows for name, _ in bars))

    def at(value: float) -> float:
        return left + (width - left - right) * value

    bottom, y = height - 38, 10.0
    for tick in (0, 0.25, 0.5, 0.75, 1.0):
        chart.line([(at(tick), 6), (at(tick), bottom)], "line")
        chart.text(at(tick), bottom + 12, f"{100 * tick:.0f} %", anchor="middle", size=12)
    for group, bars in rows:
        chart.text(0, y + bar / 2, group, colour="ink")
        for name, share in bars:
            exists = share == share
            chart.box(left, y, at(share) - left if exists else 0, bar, f"s{names.index(name) % 5}", 0.9)
            chart.text(left - 10, y + bar / 2, name, anchor="end", size=12)
            chart.text((at(share) if exists else left) + 8, y + bar / 2, f"{100 * share:.0f} %" if exists else "-", colour="ink", size=12)
            y += bar + 4
        y += gap
    chart.text((left + width - right) / 2, height - 7, x_label, anchor="middle", size=12)
    return chart
