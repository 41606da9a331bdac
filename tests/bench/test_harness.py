"""The harness refuses wrong results, takes scores pair by pair, and its files survive a cut."""

from __future__ import annotations

import importlib
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mwm.bench import bars
from mwm.bench.harness import Case, Check, Match, WrongResult, measure, timed
from mwm.bench.rows import COLUMNS, Row, Sink, read_csv
from mwm.bench.suite import run


class Side:
    """A reading that counts its calls and returns prepared values."""

    def __init__(self, *values: float) -> None:
        self.values, self.calls = values, 0

    def __call__(self) -> float:
        self.calls += 1
        return self.values[(self.calls - 1) % len(self.values)]


def case(ours: Side, rival: Side, check: Check | None = None, **options: object) -> Case:
    checks = {} if check is None else {"rival": check}
    return Case("encoder", "a case", lambda: Match(ours, {"rival": rival}, checks, warmup=0, **options), pairs=3)


@pytest.mark.parametrize("check", [Check(2e-3, 1e-3), Check(math.nan, 1e-3), None], ids=["too far", "NaN", "never compared"])
def test_a_wrong_or_unchecked_result_is_never_timed(check: Check | None, tmp_path: Path) -> None:
    ours, rival = Side(1.0), Side(2.0)
    with pytest.raises(WrongResult, match="not timing"):
        measure(case(ours, rival, check))
    assert ours.calls == rival.calls == 0
    good = case(Side(1.0), Side(2.0), Check(0.0, 0.0))
    rows, failures = run([case(ours, rival, check), good], Sink(tmp_path / "rows.csv"), say=lambda text: None)
    assert len(rows) == 1 and len(failures) == 1 and "not timing" in failures[0]
    assert len(read_csv(tmp_path / "rows.csv")) == 1


def test_a_broken_kernel_is_refused_by_a_real_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    from mwm.bench import bench_layers, bench_sample_active
    from mwm.bench.layer_list import SMOKE

    from mwm import ops

    importlib.import_module("mwm.sparse")  # binds the true functions before they are replaced
    exact = ops.pack_tiles
    monkeypatch.setattr(ops, "pack_tiles", lambda x, plan: exact(x, plan).roll(1, 0))  # every tile in its neighbour's place
    with pytest.raises(WrongResult, match="3x3 8 t2"):
        measure(Case("layers", SMOKE[0].name, lambda: bench_layers.prepare(SMOKE[0], 0.5, False, batch=2, grid=3, smoke=True)), 1)
    drawn = ops.sample_active
    monkeypatch.setattr(ops, "sample_active", lambda *a, backend=None, **k: drawn(*a, backend=backend, **k) if backend else ~drawn(*a, **k))
    with pytest.raises(WrongResult):
        measure(Case("sampler", "masks", lambda: bench_sample_active.prepare(16, 3)), 1)


def test_scores_are_taken_pair_by_pair() -> None:
    # Both sides slow down together in the second pair: the ratio of each pair is 2, 2.1, 1.9.
    (row,) = measure(case(Side(1.0, 10.0, 1.0), Side(2.0, 21.0, 1.9), Check(0.0, 0.0)))
    assert row.score == pytest.approx(2.0) and (row.ours, row.theirs) == (1.0, 2.0)
    (row,) = measure(case(Side(30.0), Side(60.0), Check(0.0, 0.0), score_is="ours in % of rival"))
    assert row.score == pytest.approx(50.0)
    (row,) = measure(case(Side(30.0), Side(60.0), Check(0.0, 0.0), score_is="ours / rival"))
    assert row.score == pytest.approx(0.5)


def test_sides_are_read_in_turn() -> None:
    order: list[str] = []

    def reading(name: str):
        return lambda: float(order.append(name) or 1.0)

    match = Match(reading("ours"), {"a": reading("a"), "b": reading("b")}, dict.fromkeys("ab", Check(0.0, 0.0)), warmup=0)
    measure(Case("x", "y", lambda: match, 2))
    assert order == ["ours", "a", "b", "ours", "a", "b"]


def test_short_steps_are_repeated_and_long_ones_are_not() -> None:
    calls = []
    assert timed(lambda: calls.append(0))() < 1.0 and len(calls) > 50
    calls.clear()
    milliseconds = timed(lambda: (calls.append(0), time.sleep(0.02)))()
    assert 19 < milliseconds and len(calls) == 3


def test_a_row_carries_bar_verdict_and_environment() -> None:
    judged = [Row("encoder", "resnet50, 60 % hidden", bars.DENSE, "ms", 1, s, s, s, s, "rival / ours", 3, 0.0, 0.0).judged() for s in (2.44, 2.45)]
    assert [row.met for row in judged] == ["missed", "met"] and judged[0].bar == "≥ 2.45"
    memory = Row("memory", "resnet50, B = 32, 60 % hidden", bars.DENSE, "MiB", 1, 2, 0.51, 0.51, 0.51, "ours / rival", 1, 0.0, 0.0).judged()
    assert memory.met == "missed"
    assert all(memory.plain()[name] for name in ("torch", "python", "cpu", "isa", "threads", "commit", "date"))


def test_every_bar_judges_a_case_that_the_suite_has() -> None:
    from mwm.bench.settings import Settings
    from mwm.bench.suite import collect

    names = [(c.bench, c.name) for c in collect("all", Settings(compiled=True))]
    for bar in bars.BARS:
        assert any(bar.covers(bench, name, bar.rival) for bench, name in names), bar
    with_bar = {(c.bench, c.name) for c in collect("all", Settings(compiled=True), part="bars")}
    for bar in bars.BARS:
        assert any(bar.covers(bench, name, bar.rival) for bench, name in with_bar), bar
    smoke = [(c.bench, c.name) for c in collect("all", Settings(smoke=True, compiled=True))]
    assert {bench for bench, _ in smoke} == {bench for bench, _ in names}
    assert not any(bars.bar_of(bench, name, bar.rival) for bench, name in smoke for bar in bars.BARS)


CUT = """
import sys, time
from mwm.bench.harness import Case, Check, Match
from mwm.bench.rows import Sink
from mwm.bench.suite import run
def slow():
    time.sleep(0.05)
    return 1.0
cases = [Case("encoder", f"case {k}", lambda: Match(slow, {"rival": slow}, {"rival": Check(0, 0)}, warmup=0), 1) for k in range(1000)]
run(cases, Sink(sys.argv[1], sys.argv[2]))
"""


def test_a_killed_run_leaves_whole_rows_and_the_next_run_appends(tmp_path: Path) -> None:
    table, lines = tmp_path / "rows.csv", tmp_path / "rows.jsonl"
    process = subprocess.Popen([sys.executable, "-c", CUT, str(table), str(lines)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while (not lines.exists() or lines.read_text().count("\n") < 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = read_csv(table)
    assert len(found) >= 3 and [row.case for row in found] == [f"case {k}" for k in range(len(found))]
    assert [json.loads(line)["case"] for line in lines.read_text().splitlines()][:3] == ["case 0", "case 1", "case 2"]

    with table.open("a") as file:
        file.write("encoder,half a li")  # what a full disk leaves
    assert [row.key for row in read_csv(table)] == [row.key for row in found]
    newer = Row("encoder", "case 0", "rival", "ms", 5, 5, 1, 1, 1, "rival / ours", 1, 0.0, 0.0).judged()
    Sink(table).add(newer)
    again = {row.key: row for row in read_csv(table)}
    assert len(again) == len(found) and again[newer.key].ours == 5


def test_a_table_of_other_columns_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns a, b"):
        Sink(tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text() == "a,b\n1,2\n" and "bench" in COLUMNS
