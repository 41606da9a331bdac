"""A tiny exported encoder and a drawn data set."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch

from mwm.train.export import Preprocessing, export

sys.path.insert(0, str(Path(__file__).parent))

from drawn import SIZE, rows_with_patients, with_splits, write_index


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks of these tests are so small that threads cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run with the exported weights of an untrained resnet10t."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)  # the same weights, whichever test asks first
    encoder = timm.create_model("resnet10t", features_only=True, in_chans=1)
    export(folder, "resnet10t", encoder, Preprocessing((SIZE, SIZE), 1, (0.5,), (0.25,), {}), seed=0)
    return folder


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Index CSV with patients and splits."""
    return write_index(tmp_path / "data", with_splits(rows_with_patients()))
