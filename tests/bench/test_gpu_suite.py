"""The GPU's benches run without a GPU in smoke mode: the same code checks its results, times every side, and writes its rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mwm.bench import gpu_bars, gpu_suite
from mwm.bench.harness import Case
from mwm.bench.rows import read_csv
from mwm.bench.settings import Settings


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Speed is not what is tested."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", gpu_suite.NAMES)
def test_smoke_mode_checks_times_and_writes(name: str, tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    assert gpu_suite.main([name, "--device", "cpu", "--smoke", "--csv", str(table)]) == 0
    rows = read_csv(table)
    assert rows and all(row.ours > 0 and row.theirs > 0 and row.difference <= row.tolerance and not row.bar for row in rows)


def test_every_bar_judges_a_case_of_the_real_run() -> None:
    cases: list[Case] = gpu_suite.collect("all", Settings(compiled=True), "cpu")
    # Which device the masks run on shows in their names.
    names = {(case.bench, re.sub(", cpu,", ", cuda,", case.name)) for case in cases}
    for bar in gpu_bars.BARS:
        assert any(gpu_bars.bar_of(bench, name, bar.rival) is not None and bar.covers(bench, name, bar.rival) for bench, name in names), bar


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible here")
def test_without_a_gpu_one_sentence_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main(["layers"]) == 2
    assert capsys.readouterr().err.startswith("mwm: bench: no CUDA device is visible.")
