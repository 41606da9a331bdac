"""The three pictures of the report: cost against visible share, layers against their limits, memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mwm.bench.bars import DENSE
from mwm.bench.encoders import MASKED
from mwm.bench.rows import Row
from PIL import Image

from mwm.view.chart import Chart, labels, ticks

NETS = {"resnet50": ("ResNet-50", "s0"), "convnext_tiny": ("ConvNeXt-T", "s2")}


def save(chart: Chart, path: Path) -> None:
    """Write a PNG of few colours."""
    chart.image(scale=1.5).quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)


def cost_chart(rows: Sequence[Row]) -> Chart | None:
    """Time of the encoder's step over the dense one's, against the visible share; None without rows."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        name, _, rest = row.case.partition(", ")
        if row.bench == "encoder" and name in NETS and row.rival == DENSE and re.fullmatch(r"[\d.]+ % hidden", rest) and row.visible is not None:
            points.setdefault((name, "ours"), []).append((row.visible, 1 / row.score))
    if not points:
        return None
    chart, left, top, width, height = Chart(760, 430, "cost against the visible share"), 70, 54, 480, 320
    high = max(1.05, *(y for line in points.values() for _, y in line)) * 1.05

    def at(x: float, y: float) -> tuple[float, float]:
        return left + width * x, top + height * (1 - y / high)

    chart.text(left - 46, 16, "Encoder step, forward + backward, over the dense channels-last step", colour="ink", size=15)
    marks = ticks(0, high, 5)
    for value, words in zip(marks, labels(marks), strict=True):
        chart.line([at(0, value), at(1, value)], "line")
        chart.text(left - 10, at(0, value)[1], words, anchor="end")
    for value in (0, 0.2, 0.4, 0.6, 0.8, 1):
        chart.text(at(value, 0)[0], top + height + 16, f"{100 * value:.0f} %", anchor="middle")
    chart.text(left + width / 2, top + height + 40, "visible share of the patches", anchor="middle")
    chart.line([at(0, 1), at(1, 1)], "s4", 1.5)
    chart.text(at(1, 1)[0] + 10, at(1, 1)[1] - 9, "dense: 1", colour="s4")
    chart.line([at(0, 0), at(1, 1)], "muted", 1.5, 0.6)
    x, y = at(0.14, 0.14)
    chart.text(x + 12, y + 10, "linear in the visible share")
    ends: list[float] = []
    for (name, _), line in points.items():
        words, colour = NETS[name]
        line.sort()
        chart.line([at(*p) for p in line], colour, 2.5)
        for p in line:
            chart.dot(*at(*p), 4, colour)
        y = at(*line[-1])[1] + 9
        while any(abs(y - other) < 16 for other in ends):
            y += 16
        ends.append(y)
        chart.text(left + width + 10, y, f"{words}: {line[-1][1]:.2f} at {100 * line[-1][0]:.0f} %", colour=colour)
    return chart


def layers_chart(rows: Sequence[Row], hidden: str = "60 % hidden") -> Chart | None:
    """Each layer's forward + backward in per cent of its limit, with its ratio to dense; None without rows."""
    found = []
    for row in rows:
        parts = row.case.split(", ")
        if row.bench == "layers" and parts[1:] == ["forward + backward", hidden] and row.limit_percent is not None:
            found.append((parts[0], row))
    if not found:
        return None
    step, top, left, width = 21, 66, 250, 360
    chart = Chart(760, top + step * len(found) + 20, "layers in per cent of their limit")
    chart.text(10, 16, f"Single layers, forward + backward, {hidden}: per cent of the arithmetic or memory limit", colour="ink", size=15)
    dense = {row.case: row.score for row in rows if row.bench == "layers"}
    chart.text(left + width + 40, 30, "dense / ours, hidden", size=11)
    chart.text(left + width + 40, 44, hidden.removesuffix(" hidden"), size=12)
    chart.text(left + width + 90, 44, "15 %", size=12)
    high = max(100.0, *(row.limit_percent for _, row in found))
    for value in ticks(0, high, 4):
        x = left + width * value / high
        chart.line([(x, top - 10), (x, top + step * len(found))], "line")
        chart.text(x, 44, f"{value:.0f} %", anchor="middle", size=12)
    for index, (words, row) in enumerate(found):
        y = top + step * index
        kind = "s2" if "GB/s" in row.limit else "s0"
        chart.text(left - 10, y + 6, words, colour="ink", anchor="end", size=12)
        chart.box(left, y, width * row.limit_percent / high, 12, kind)
        for x, score in ((40, row.score), (90, dense.get(row.case.replace(hidden, "15 % hidden")))):
            if score is not None:
                chart.text(left + width + x, y + 6, f"{score:.2f}", colour="s1" if score < 1 else "ink", size=12)
    y = top + step * len(found) + 8
    for x, colour, words in ((left, "s0", "of the arithmetic limit"), (left + 190, "s2", "of the memory limit")):
        chart.box(x, y, 12, 8, colour)
        chart.text(x + 18, y + 4, words, size=12)
    return chart


def memory_chart(rows: Sequence[Row]) -> Chart | None:
    """Peak memory of each side; None without rows."""
    cases: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.bench == "memory":
            cases.setdefault(row.case, {"mwm": row.ours})[row.rival] = row.theirs
    bars = [(case, side, mib) for case, sides in cases.items() for side, mib in sides.items()]
    if not bars:
        return None
    top, left, width, step, gap = 50, 210, 420, 26, 34
    chart = Chart(760, top - 20 + step * len(bars) + (gap - 10) * len(cases), "peak memory")
    chart.text(10, 16, "Peak memory of the encoder step above parameters, gradients and optimizer state", colour="ink", size=15)
    high, y, last = max(mib for *_, mib in bars), top - 10, ""
    for case, side, mib in bars:
        if case != last:
            chart.text(10, y + 8, case.replace("resnet50", "ResNet-50").replace("convnext_tiny", "ConvNeXt-T"), colour="ink", size=13)
            y, last = y + gap - 10, case
        colour = "s0" if side == "mwm" else "s1" if side == MASKED else "s4"
        chart.text(left - 10, y + 8, side, anchor="end", size=12)
        chart.box(left, y, width * mib / high, 16, colour)
        chart.text(left + width * mib / high + 8, y + 8, f"{mib / 1024:.2f} GiB", colour="ink", size=12)
        y += step
    return chart
