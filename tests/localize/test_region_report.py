"""The report of a run: its figures by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from mwm.localize.region_report import RegionReport, entropy


def test_entropy_is_0_for_a_point_and_1_for_an_even_map() -> None:
    point = torch.zeros(8, 8)
    point[3, 4] = 0.7
    assert entropy(point) == 0 and entropy(torch.full((8, 8), 0.2)) == pytest.approx(1)
    half = torch.zeros(8, 8)
    half[:4] = 0.5
    assert entropy(half) == pytest.approx(math.log(32) / math.log(64))
    assert math.isnan(entropy(torch.zeros(8, 8)))


def test_figures_are_those_counted_by_hand(tmp_path: Path) -> None:
    report = RegionReport()
    two = torch.zeros(10, 10)
    two[:2, :5] = two[6:8, 5:] = 1
    report.add(two, heat=two * 0.5, similarity=torch.tensor(0.3))
    report.add(torch.zeros(10, 10))
    report.add(torch.ones(4, 4), similarity=0.1)
    told = report.to_dict()
    assert (told["images"], told["empty"], told["full"]) == (3, 1, 1) and told["share_full"] == pytest.approx(1 / 3)
    assert told["area"]["mean"] == pytest.approx(0.6) and told["components"]["mean"] == 1.5
    assert told["entropy"]["values"] == 1 and told["entropy"]["mean"] == pytest.approx(math.log(20) / math.log(100))
    assert told["similarity"]["mean"] == pytest.approx(0.2)
    assert "1 of 3 regions are empty" in str(report) and "cosine 0.200" in str(report)
    assert json.loads(report.write(tmp_path, check={"verdict": "pass"}).read_text())["check"]["verdict"] == "pass"
    assert RegionReport().to_dict()["area"]["mean"] is None and str(RegionReport()) == ""
