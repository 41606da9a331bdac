"""The pictures of a study: contrasts with their intervals, and endpoints against the share of the image that was really hidden."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mwm.study.analysis import DESCRIPTIVE, PRIMARY, ArmFigure, Difference, Plan
from mwm.study.collect import Collected
from mwm.study.tables import NAMES, TASKS, cost
from mwm.view.chart import Chart, labels, ticks

_HEADLINES = (("segment", "dice"), ("classify", "auroc"), ("probe", "auroc"), ("detect", "box_ap"), ("detect", "mask_ap"))


def plots(found: Collected, plan: Plan, figures: Sequence[ArmFigure], differences: Sequence[Difference]) -> dict[str, Chart]:
    """Charts by file name without extension: `contrasts-DATA`, and `hidden-DATA-TASK-ENDPOINT` for the main endpoint of each task."""
    charts = {}
    for data in sorted(found.folds):
        rows = [row for row in differences if row.data == data and (row.task, row.endpoint) in _HEADLINES and row.kind != DESCRIPTIVE]
        if rows:
            charts[f"contrasts-{data}"] = forest(rows, plan, title=f"{data}: first arm minus second")
        for task, endpoint in _HEADLINES:
            held = [row for row in figures if (row.data, row.task, row.endpoint) == (data, task, endpoint)]
            shares = {row["arm"]: row for row in cost(found, data)}
            chart = against_hidden([row for row in held if row.arm in shares], shares, title=f"{data}: {TASKS[task]}", endpoint=endpoint)
            if chart is not None:
                charts[f"hidden-{data}-{task}-{endpoint}"] = chart
    return charts


def forest(rows: Sequence[Difference], plan: Plan, *, title: str, width: int = 900) -> Chart:
    """Contrasts with intervals, one per line; the primary one in colour, the span of no interest shaded.

    Args:
        rows: Contrasts, in order.
        plan: For the smallest effects of interest.
        title: First line.
        width: Pixels.

    Raises:
        ValueError: there are none.
    """
    if not rows:
        raise ValueError("forest: rows must hold at least one contrast, got none.")
    line, top, left, right = 34, 62, 300, 210
    groups = list(dict.fromkeys((row.task, row.endpoint) for row in rows))
    height = top + line * len(rows) + 30 * len(groups) + 46
    ends = [value for row in rows for value in (row.figure.low, row.figure.high, row.figure.difference) if math.isfinite(value)] + [0.0]
    effects = [plan.effects.get(endpoint, 0.0) for _, endpoint in groups]
    low, high = min(*ends, *(-e for e in effects)), max(*ends, *effects)
    pad = 0.06 * max(high - low, 1e-3)
    low, high = low - pad, high + pad
    chart = Chart(width, height, title)

    def at(value: float) -> float:
        return left + (width - left - right) * (value - low) / (high - low)

    bottom = height - 46
    chart.text(0, 12, title, colour="ink", size=15)
    chart.text(at(0) - 10, 40, "second higher", anchor="end", size=12)
    chart.text(at(0) + 10, 40, "first higher", size=12)
    for tick, words in zip(marks := ticks(low, high), labels(marks), strict=True):
        chart.line([(at(tick), top), (at(tick), bottom)], "line")
        chart.text(at(tick), bottom + 15, words, anchor="middle", size=12)
    y = float(top)
    for task, endpoint in groups:
        own = [row for row in rows if (row.task, row.endpoint) == (task, endpoint)]
        effect = plan.effects.get(endpoint, 0.0)
        if effect:
            chart.box(at(-effect), y + 30, at(effect) - at(-effect), line * len(own), "muted", 0.12)
        chart.text(0, y + 16, f"{TASKS[task]}, {NAMES[endpoint]}", colour="muted", size=12)
        y += 30
        for row in own:
            _line(chart, row, at, y + line / 2, width)
            y += line
    chart.line([(at(0), top - 8), (at(0), bottom)], "ink", 1.2)
    chart.text((left + width - right) / 2, height - 9, "difference with 95 % interval over patients; shaded: below the smallest effect of interest", anchor="middle", size=12)
    return chart


def _line(chart: Chart, row: Difference, at, y: float, width: int) -> None:
    colour = "s0" if row.kind == PRIMARY else "s4"
    chart.text(0, y, f"{row.first} - {row.second}", colour="ink")
    chart.line([(at(row.figure.low), y), (at(row.figure.high), y)], colour, 3.0 if row.kind == PRIMARY else 2.0, 0.8)
    for end in (row.figure.low, row.figure.high):
        chart.line([(at(end), y - 5), (at(end), y + 5)], colour, 2.0, 0.8)
    chart.dot(at(row.figure.difference), y, 6 if row.kind == PRIMARY else 5, colour)
    p = row.figure.p if row.kind == PRIMARY else row.p_holm
    said = "" if not math.isfinite(p) else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    words = ", ".join(part for part in ("primary" if row.kind == PRIMARY else "Holm", said, f"n = {row.figure.patients}") if part)
    chart.text(width, y, words, colour="ink" if row.kind == PRIMARY else "muted", anchor="end", size=12)


def against_hidden(rows: Sequence[ArmFigure], shares: Mapping[str, Mapping[str, Any]], *, title: str, endpoint: str, width: int = 900, height: int = 430) -> Chart | None:
    """An endpoint against the realised hidden share; at the right each arm's share and the time of a pre-training step.

    Arms that hide the same number of patches stand side by side around their common share.

    Args:
        rows: One endpoint of several arms.
        shares: By arm: `hidden_share` and `step_ms`.
        title: First line.
        endpoint: Its name.
        width, height: Pixels.

    Returns:
        The chart, or None where fewer than two arms hid anything.
    """
    known = [row for row in rows if math.isfinite(row.figure.value)]
    shown = sorted((row for row in known if shares[row.arm]["hidden_share"] is not None), key=lambda row: shares[row.arm]["hidden_share"])
    if len(shown) < 2:
        return None
    plain = [row for row in known if shares[row.arm]["hidden_share"] is None]  # no pre-training: a level, not a point
    left, right, top, bottom = 64, 300, 56, 52
    height = max(height, top + 30 + 20 * len(known) + bottom)
    x = _beside([shares[row.arm]["hidden_share"] for row in shown])
    ends = [value for row in shown for value in (*_ends(row), row.figure.value)] + [row.figure.value for row in plain]
    x_low, x_high = min(x) - 0.04, max(x) + 0.04
    pad = 0.1 * max(max(ends) - min(ends), 1e-3)
    y_low, y_high = min(ends) - pad, max(ends) + pad
    chart = Chart(width, height, title)

    def at(share: float, value: float) -> tuple[float, float]:
        return left + (width - left - right) * (share - x_low) / (x_high - x_low), top + (height - top - bottom) * (y_high - value) / (y_high - y_low)

    chart.text(0, 12, title, colour="ink", size=15)
    for tick, words in zip(marks := ticks(y_low, y_high), labels(marks), strict=True):
        chart.line([at(x_low, tick), at(x_high, tick)], "line")
        chart.text(left - 8, at(x_low, tick)[1], words, anchor="end", size=12)
    for tick, words in zip(marks := ticks(x_low, x_high, 6), labels(marks), strict=True):
        chart.text(at(tick, y_low)[0], height - bottom + 16, words, anchor="middle", size=12)
    for row in plain:
        chart.line([at(x_low, row.figure.value), at(x_high, row.figure.value)], "s4", 1.6, 0.7)
    for row in shown:  # where the arms really are, since dots may stand beside their place
        across, down = at(shares[row.arm]["hidden_share"], y_low)
        chart.line([(across, down), (across, down + 6)], _colour(row.arm), 2.0)
    for number, (row, share) in enumerate(zip(shown, x, strict=True), 1):
        colour, (low, high) = _colour(row.arm), _ends(row)
        chart.line([at(share, low), at(share, high)], colour, 2.2, 0.6)
        for end in (low, high):
            across, down = at(share, end)
            chart.line([(across - 4, down), (across + 4, down)], colour, 1.8, 0.6)
        chart.dot(*at(share, row.figure.value), 5, colour)
        chart.text(at(share, high)[0], at(share, high)[1] - 10, str(number), colour="ink", anchor="middle", size=12)
    edge, y = width - right + 28, float(top)
    for place, anchor, words in ((edge + 24, "start", "arm"), (width - 74, "end", "hidden"), (width, "end", "ms/step")):
        chart.text(place, y, words, anchor=anchor, size=12)
    for number, row in enumerate([*shown, *plain], 1):
        y += 20
        share, step = shares[row.arm]["hidden_share"], shares[row.arm]["step_ms"]
        if share is None:
            chart.line([(edge, y), (edge + 14, y)], "s4", 1.6, 0.7)
        else:
            chart.text(edge, y, str(number), colour="ink", size=12)
        chart.text(edge + 24, y, row.arm, colour=_colour(row.arm) if share is not None else "muted", size=13)
        chart.text(width - 74, y, "-" if share is None else f"{100 * share:.0f} %", colour="ink", anchor="end", size=12)
        chart.text(width, y, "-" if step is None else f"{step:.0f}", colour="ink", anchor="end", size=12)
    chart.text((left + width - right) / 2, height - 10, "share of patches really hidden (marks); arms that hide as many stand side by side", anchor="middle", size=12)
    counts = sorted({row.figure.patients for row in shown})
    bars = "range over folds" if shown[0].kind == DESCRIPTIVE else f"95 % interval over {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} patients or blocks"
    chart.text(0, 34, f"{NAMES[endpoint]}, {bars}", size=12)
    return chart


def _colour(arm: str) -> str:
    return "s0" if arm.startswith("region") else "s1" if arm.startswith("uniform") else "s2"


def _ends(row: ArmFigure) -> tuple[float, float]:
    inferred = row.kind != DESCRIPTIVE and math.isfinite(row.figure.low)
    return (row.figure.low, row.figure.high) if inferred else row.figure.spread


def _beside(shares: Sequence[float], *, step: float = 0.012, most: float = 0.04) -> list[float]:
    """Sorted shares, those closer than `step` moved apart around their mean, over `most` in all."""
    groups: list[list[float]] = []
    for share in shares:
        if groups and share - groups[-1][-1] < step:
            groups[-1].append(share)
        else:
            groups.append([share])
    apart = [min(step, most / max(1, len(group) - 1)) for group in groups]
    return [sum(group) / len(group) + gap * (k - (len(group) - 1) / 2) for group, gap in zip(groups, apart, strict=True) for k in range(len(group))]
