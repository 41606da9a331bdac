"""Options of `pytest bench/`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mwm bench")
    group.addoption("--smoke", action="store_true", help="tiny cases, to see that the benches run")
    group.addoption("--compiled", action="store_true", help="torch.compile of the dense encoder is a rival, too")
    group.addoption("--csv", metavar="FILE", help="append every row here, in the schema of `mwm bench`")
    group.addoption("--json-rows", metavar="FILE", help="the same, one JSON object per line")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bench_case" in metafunc.fixturenames:
        from mwm.bench.settings import Settings
        from mwm.bench.suite import collect

        found = collect("all", Settings(smoke=metafunc.config.getoption("--smoke"), compiled=metafunc.config.getoption("--compiled")))
        metafunc.parametrize("bench_case", found, ids=[f"{case.bench}: {case.name}" for case in found])
