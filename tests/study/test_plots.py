"""The pictures of a study: where the dots of an arm stand, and what is said beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # import-mode importlib does not; made_up.py is shared
from made_up import data_set, study

from mwm.study.analysis import Plan, differences, figures
from mwm.study.collect import collect
from mwm.study.plots import _beside, plots
from mwm.study.tables import cost
from mwm.view.chart import Chart

MEASURED = {"uniform": (0.5, 0.425, 4995.0), "region": (0.6, 0.424, 5060.0), "scratch": (0.1, None, None), "uniform60": (0.4, 0.6, 3700.0), "uniform60_time": (0.4, 0.6, 3700.0)}
PLAN = Plan.from_dict({"primary_endpoints": {"toy": "segment/dice"}})


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    study(folder / "out", data_set(folder / "toy"), name="toy", arms=MEASURED)
    return folder / "out"


def _words(chart: Chart) -> list[str]:
    return [shape[2] for shape in chart.shapes if shape[0] == "text"]


def test_the_endpoint_stands_at_the_share_that_was_really_hidden_with_the_step_time_beside_it(out: Path) -> None:
    found = collect(out)
    chart = plots(found, PLAN, figures(found, PLAN, rounds=50), differences(found, PLAN, rounds=50))["hidden-toy-segment-dice"]
    words = _words(chart)
    assert words[0] == "toy: segmentation" and "Dice, 95 % interval over 16 patients or blocks" in words and "ms/step" in words
    listed = words[words.index("ms/step") + 1:]
    assert listed[:-2] == ["1", "region", "42 %", "5060", "2", "uniform", "42 %", "4995", "3", "uniform60", "60 %", "3700", "4", "uniform60_time", "60 %", "3700",
                           "scratch", "-", "-"]
    dots = [shape[1][:2] for shape in chart.shapes if shape[0] == "dot"]
    assert len(dots) == 4 and dots[0][0] < dots[1][0] < dots[2][0] < dots[3][0]
    marks = [shape[1][0][0] for shape in chart.shapes if shape[0] == "line" and len(shape[1]) == 2 and shape[1][1][1] - shape[1][0][1] == 6]
    assert [(marks[k] + marks[k + 1]) / 2 for k in (0, 2)] == [pytest.approx((dots[k][0] + dots[k + 1][0]) / 2) for k in (0, 2)]
    values = {row.arm: row.figure.value for row in figures(found, PLAN, rounds=20) if (row.task, row.endpoint) == ("segment", "dice")}
    order = sorted(("region", "uniform", "uniform60", "uniform60_time"), key=values.__getitem__)
    assert [name for _, name in sorted(zip([-y for _, y in dots], ("region", "uniform", "uniform60", "uniform60_time"), strict=True))] == order


def test_a_study_with_one_fold_so_far_has_its_picture(out: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(out, tmp_path / "out")
    for cell in (tmp_path / "out" / "cells" / "toy").glob("*/[1-4]"):
        shutil.rmtree(cell)
    found = collect(tmp_path / "out")
    charts = plots(found, PLAN, figures(found, PLAN, rounds=20), differences(found, PLAN, rounds=20))
    assert set(charts) == {"hidden-toy-segment-dice", "hidden-toy-classify-auroc"} and charts["hidden-toy-segment-dice"].image().size[0] > 900


def test_arms_of_several_numbers_of_patients_say_so(out: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(out, tmp_path / "out")
    for cell in (tmp_path / "out" / "cells" / "toy" / "uniform60").glob("[1-4]"):
        shutil.rmtree(cell)
    found = collect(tmp_path / "out")
    arms = figures(found, PLAN, rounds=20)
    least = min(row.figure.patients for row in arms if (row.arm, row.endpoint) == ("uniform60", "dice"))
    words = _words(plots(found, PLAN, arms, [])["hidden-toy-segment-dice"])
    assert least < 16 and f"Dice, 95 % interval over {least} to 16 patients or blocks" in words


def test_the_costs_say_what_equal_time_means(out: Path) -> None:
    from mwm.study.tables import _cost

    text = _cost(collect(out), "toy")
    assert "`uniform60_time` takes as many epochs as fit the pre-training time of `region`" in text
    assert {row["arm"]: row["step_ms"] for row in cost(collect(out), "toy")}["uniform60"] == 3700.0


def test_arms_with_one_share_stay_near_it() -> None:
    x = _beside([0.42] * 9 + [0.6])
    assert x == sorted(x) and x[8] - x[0] == pytest.approx(0.04) and sum(x[:9]) / 9 == pytest.approx(0.42) and x[9] == 0.6
    assert _beside([0.3, 0.6]) == [0.3, 0.6]
