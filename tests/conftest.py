"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real scans; tests that need it skip, with the reason, where it is absent."""
    root = Path(os.environ.get("MWM_DATA", Path(__file__).resolve().parents[1].parent / "shared" / "data"))
    if not (root / "SOURCES.md").exists():
        pytest.skip(f"real scans are not at {root}; set MWM_DATA to a folder that has them")
    return root


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
