"""The published study: its archive of cells names nobody, and gives the figures that are printed."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path

import pytest

from mwm.study.analysis import Plan, differences
from mwm.study.archive import unpack
from mwm.study.collect import collect
from mwm.study.mask_facts import mask_facts
from mwm.study.region_facts import region_facts

RESULTS = Path(__file__).resolve().parents[2] / "studies" / "results" / "cpu"


def _rows(name: str, data: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["data_set"] == data]


@pytest.mark.slow
def test_the_archive_gives_the_published_figures(tmp_path: Path) -> None:
    cells, _ = unpack(RESULTS / "cells.zip", tmp_path / "study")
    found = collect(tmp_path / "study")
    whole = [data for data in found.folds if all({row["fold"] for row in found.rows if (row["data_set"], row["arm"]) == (data, arm)} == set(range(5)) for arm in found.arms(data))]
    assert cells >= 20 and "chest_xray" in whole
    contrasts = differences(found, Plan())
    for data in whole:
        held = {(row["arm"], row["fold"], row["task"], row["endpoint"]): row["value"] for row in _rows("results.csv", data)}
        for row in found.rows:
            if row["data_set"] == data:
                assert float(held[row["arm"], str(row["fold"]), row["task"], row["endpoint"]]) == pytest.approx(row["value"])
        published = {(row["first"], row["second"], row["task"], row["endpoint"]): row for row in _rows("contrasts.csv", data)}
        counted = [row for row in contrasts if row.data == data]
        assert len(counted) == len(published) > 0
        for row in counted:
            printed = published[row.first, row.second, row.task, row.endpoint]
            for name in ("difference", "low", "high", "p"):
                assert float(printed[name]) == pytest.approx(getattr(row.figure, name), rel=1e-5, abs=1e-9), (row, name)
            assert printed["kind"] == row.kind
        for name, facts in (("regions.csv", region_facts(tmp_path / "study")), ("masks.csv", mask_facts(tmp_path / "study"))):
            assert len(_rows(name, data)) == len([row for row in facts if row["data_set"] == data]) > 0


def test_the_archive_names_no_image_and_no_patient() -> None:
    with zipfile.ZipFile(RESULTS / "cells.zip") as archive:
        for name in archive.namelist():
            text = archive.read(name).decode()
            for told in (".png", ".jp", "person", "k-", "images/", '"/', ": /"):
                assert told not in text, (name, told)
