"""Every bench runs in smoke mode: it checks its results, times every side, and writes its rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mwm.bench import suite
from mwm.bench.rows import read_csv

from mwm.cli import main

SIDES = {
    "sampler": {"authors' loop", "batched argsort (equal counts only)", "our plain-torch reference", "memory bandwidth"},
    "coverage": {"memory bandwidth"},
    "plan": {"encoder step of as many images"},
    "layers": {"dense channels-last"},
    "encoder": {"dense channels-last", "dense channels-last, torch.compile", "mask-multiply NCHW", "mask-multiply channels-last"},
    "step": {"authors' step as shipped (fp32)"},
    "memory": {"dense channels-last"},
    "threads": {"1 thread"},
    "localize": {"the authors' procedure", "the same, one by one"},
}


@pytest.fixture(autouse=True)
def one_thread():
    """Speed is not what is tested, and two threads on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_table_names_every_bench() -> None:
    assert set(SIDES) == set(suite.BENCHES)


@pytest.mark.parametrize("name", SIDES)
def test_smoke_mode_checks_times_and_writes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, lines = tmp_path / "rows.csv", tmp_path / "rows.jsonl"
    words = ["--compiled"] if name == "encoder" else []
    assert main(["bench", name, "--smoke", "--csv", str(table), "--json", str(lines), *words]) == 0
    rows = read_csv(table)
    assert {row.rival for row in rows} == SIDES[name]
    assert all(row.ours > 0 and row.theirs > 0 and row.score > 0 and row.difference <= row.tolerance for row in rows)
    assert all(row.commit and row.cpu and row.torch for row in rows)
    assert [json.loads(line)["case"] for line in lines.read_text().splitlines()] == [row.case for row in rows]
    assert f"{len(rows)} rows" in capsys.readouterr().out
    if name == "layers":
        assert all(row.limit_percent is not None and row.limit for row in rows)


def test_masks_are_never_shown_without_the_coverage_they_start_from(tmp_path: Path) -> None:
    assert main(["bench", "sampler", "--smoke", "--only", "16 images", "--csv", str(tmp_path / "rows.csv")]) == 0
    assert {row.bench for row in read_csv(tmp_path / "rows.csv")} == {"sampler", "coverage"}


def test_a_case_that_fails_gives_exit_code_1_and_spares_the_others(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mwm.bench import bench_sample_active

    monkeypatch.setattr(bench_sample_active, "draw_masks", lambda inside, high, low: inside)
    assert main(["bench", "sampler", "--smoke"]) == 1
    captured = capsys.readouterr()
    assert "not timing" in captured.err and "coverage" in captured.out


def test_an_unknown_case_is_refused_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "plan", "--smoke", "--only", "nothing like it"]) == 2
    assert capsys.readouterr().err.startswith("mwm: bench: --only and --part must match")
