"""The bench of single layers runs: it checks its results before it times them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mwm.bench import bench_layers


@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["float32", "bfloat16"])
def test_smoke_mode_checks_and_times_every_kind_of_layer(precision: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench_layers.main(["--smoke", "--json", str(tmp_path / "rows.json"), *precision])
    assert len(rows) == 2 * len(bench_layers.SMOKE)
    assert all(row.difference is not None and row.difference < 1e-2 for row in rows)
    assert "dense channels-last" in capsys.readouterr().out
    assert {"torch", "cpu", "commit"} <= json.loads((tmp_path / "rows.json").read_text())["environment"].keys()
