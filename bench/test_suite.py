"""The suite under pytest-benchmark: `pytest bench/ [--smoke] [--csv FILE] [-k encoder]`, the same cases as `mwm bench all`.

pytest-benchmark shows the time of our side (`--benchmark-json` stores it, with the rows as extra information); the rivals are read
before each of its rounds, so that the sides alternate as under `mwm bench`.
"""

from __future__ import annotations

import pytest
from mwm.bench.harness import Case, other_sides, refuse_wrong, rows_of
from mwm.bench.rows import Sink


@pytest.mark.timeout(900)
def test_case(bench_case: Case, benchmark, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    match = bench_case.prepare()
    refuse_wrong(bench_case, match)
    others = other_sides(match)
    for reading in [match.ours, *others.values()]:
        for _ in range(match.warmup):
            reading()
    mine: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in others}

    def rivals() -> None:
        for name, reading in others.items():
            theirs[name].append(reading())

    benchmark.group = bench_case.bench
    benchmark.pedantic(lambda: mine.append(match.ours()), setup=rivals, rounds=bench_case.pairs)
    rows = rows_of(bench_case, match, mine, theirs)
    sink = Sink(request.config.getoption("--csv"), request.config.getoption("--json-rows"))
    for row in rows:
        sink.add(row)
    benchmark.extra_info["rows"] = [row.plain() for row in rows]
    with capsys.disabled():
        print("\n" + "\n".join(row.line() for row in rows))
