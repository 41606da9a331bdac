"""Fixtures of the CUDA tests, and the way to the harness one folder up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import emulator


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The CUDA sources, compiled for the CPU."""
    return emulator.load()


@pytest.fixture(params=[0, 1, 2], ids=["forwards", "backwards", "shuffled"])
def order(request: pytest.FixtureRequest, emulated: ModuleType) -> Iterator[int]:
    """`backend="cuda"` runs the emulation, with threads and blocks in one of three orders."""
    emulated.set_order(request.param)
    with emulator.backend_on_cpu(emulated):
        yield request.param
    emulated.set_order(0)
