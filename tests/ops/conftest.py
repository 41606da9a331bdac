"""Fixtures of the op tests, and the way to the harness one folder up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mwm import _core


@pytest.fixture(params=_core.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this CPU has, in turn."""
    before = _core.isa()
    assert _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)
