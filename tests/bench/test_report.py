"""The report tells what was reached and what was not, and draws what was measured."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mwm.bench import plots
from mwm.bench.bars import BARS, DENSE
from mwm.bench.encoders import MASKED
from mwm.bench.report import report, write
from mwm.bench.rows import Row, Sink
from PIL import Image

ENCODER = Row("encoder", "resnet50, 60 % hidden", DENSE, "ms", 500, 1000, 2.0, 1.9, 2.1, "rival / ours", 7, 1e-6, 1e-4, visible=0.41)
LAYER = Row("layers", "resnet50: 3x3 64 t8, forward + backward, 60 % hidden", DENSE, "ms", 10, 20, 2.0, 1.9, 2.1, "rival / ours", 7, 1e-6, 1e-5,
            visible=0.41, limit_percent=83.0, limit="228 GFLOP/s (best oneDNN convolution)")
MEMORY = Row("memory", "resnet50, B = 32, 60 % hidden", DENSE, "MiB", 2000, 5000, 0.4, 0.4, 0.4, "ours / rival", 1, 1e-6, 1e-4, visible=0.41)


def bar_line(text: str, page: str) -> str:
    """The line of the table of bars that begins with this work."""
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {text} |")]
    return line


def test_a_missed_bar_is_marked_and_named() -> None:
    bar = next(bar for bar in BARS if bar.covers(*ENCODER.key))
    missed, met = report([ENCODER.judged()], {}), report([replace(ENCODER, score=2.45).judged()], {})
    assert "**missed**" in bar_line(bar.text, missed) and f"Missed: {bar.text}." in missed and "bar ≥ 2.45 **missed**" in missed
    assert bar_line(bar.text, met).endswith("| met |") and "Missed: none" in met


def test_a_bar_without_rows_is_not_measured_rather_than_met() -> None:
    page = report([ENCODER.judged()], {})
    for bar in BARS:
        assert ("not measured" in bar_line(bar.text, page)) != bar.covers(*ENCODER.key)


def test_one_slow_layer_fails_the_bar_of_all_layers_and_is_listed() -> None:
    slow = replace(LAYER, case="resnet50: 1x1 64-256 t8, forward, 15 % hidden", score=0.93)
    page = report([LAYER.judged(), slow.judged()], {})
    line = bar_line("no layer of ResNet-50 slower than dense, up to 85 % visible", page)
    assert "**missed** by 1" in line and "0.93" in line and slow.case in line
    lost = page.split("## Where it loses")[1].split("##")[0]
    assert slow.case in lost and LAYER.case not in lost
    assert "**slower**" in page


def test_memory_counts_downwards() -> None:
    bar = next(bar for bar in BARS if bar.covers(*MEMORY.key))
    assert bar_line(bar.text, report([MEMORY.judged()], {})).endswith("| met |")
    assert "missed" in bar_line(bar.text, report([replace(MEMORY, score=0.51).judged()], {}))


def test_the_page_and_its_pictures_follow_from_the_table_alone(tmp_path: Path) -> None:
    sink = Sink(tmp_path / "results" / "cpu.csv")
    rows = [ENCODER, replace(ENCODER, case="resnet50, 0 % hidden", visible=1.0, score=0.9), LAYER, MEMORY, replace(MEMORY, rival=MASKED, theirs=6000)]
    for row in [*rows, replace(ENCODER, case="smoke: resnet18")]:
        sink.add(row.judged())
    done = subprocess.run([sys.executable, "-m", "mwm.bench.report", "--csv", str(sink.csv_path), "--out", str(tmp_path / "RESULTS.md")],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "RESULTS.md").read_text()
    assert "smoke" not in page and ENCODER.torch in page
    for name in ("cost", "layers", "memory"):
        picture = tmp_path / "results" / f"cpu_{name}.png"
        assert f"results/cpu_{name}.png" in page
        with Image.open(picture) as image:
            assert image.width > 500 and len(image.convert("RGB").getcolors(1 << 16)) > 3
    first = (tmp_path / "results" / "cpu_cost.png").read_bytes()
    write(sink.csv_path, tmp_path / "RESULTS.md")
    assert (tmp_path / "results" / "cpu_cost.png").read_bytes() == first


@pytest.mark.parametrize("chart", [plots.cost_chart, plots.layers_chart, plots.memory_chart])
def test_no_rows_no_picture(chart) -> None:
    assert chart([]) is None


def test_rows_of_a_gpu_make_a_page_with_their_own_bars() -> None:
    rows = [replace(ENCODER, bench="gpu encoder", case=f"resnet50, 60 % hidden, {how}", score=score, cpu="NVIDIA H100", isa="sm_90")
            for how, score in (("graph", 2.13), ("eager", 0.56))]
    page = report(rows, {})
    assert page.startswith("# Measured on a GPU") and "results/gpu.csv" in page and "NVIDIA H100" in page
    assert bar_line("ResNet-50 and ConvNeXt-S encoder step against dense, graphed", page).endswith("| met |")
    assert "**missed**" in bar_line("ResNet-50 and ConvNeXt-S encoder step against dense, eager", page)
    assert "resnet50, 60 % hidden, eager" in page.split("## Where it loses")[1].split("##")[0]
    assert "not measured" in bar_line("depthwise 7x7 against cuDNN", page)
