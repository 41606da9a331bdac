"""The study that compares the two ways to decode runs, and adds to its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

study_decode = pytest.importorskip("mwm.bench.study_decode", reason="the benches are not installed")


def test_smoke_measures_both_parts_and_adds_to_the_file(tmp_path: Path) -> None:
    out = tmp_path / "decode.json"
    out.write_text('{"speed": [{"old": 1}]}')
    study_decode.main(["--smoke", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["speed"][0] == {"old": 1} and found["speed"][1]["dense_over_hidden"] > 0
    (quality,) = found["quality"]
    assert [row["mode"] for row in quality["rows"]] == ["dense", "hidden", "untrained"]
    assert all(0 <= row["probe_auroc"] <= 1 for row in quality["rows"])
    assert all(row["held_out_loss"] > 0 for row in quality["rows"] if row["mode"] != "untrained")
    assert quality["environment"]["commit"]


def test_a_folder_without_an_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"DATA must hold an index.csv"):
        study_decode.main(["quality", str(tmp_path)])
