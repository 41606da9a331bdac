"""Where the CUDA tests run, and the way to the harness one folder up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import emulator  # noqa: E402
from emulator import Target  # noqa: E402

ORDERS = {"forwards": 0, "backwards": 1, "shuffled": 2}


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The CUDA sources, compiled for the CPU."""
    return emulator.load()


def _target(request: pytest.FixtureRequest) -> Iterator[Target]:
    where, how = request.param
    if where == "emulated":
        module = request.getfixturevalue("emulated")
        module.set_order(ORDERS[how])
        with emulator.backend_on_cpu(module):
            yield Target(torch.device("cpu"), "cuda")
        module.set_order(0)
        return
    if how == "none":
        pytest.skip("needs a CUDA device")
    # The dense rival would round its operands to TF32, and its error would allow us the same.
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield Target(torch.device("cuda"), how)
    torch.backends.cudnn.allow_tf32 = before


_ON_GPU = [pytest.param(("gpu", name), marks=pytest.mark.gpu, id=f"gpu-{name}") for name in (("cuda", "triton") if torch.cuda.is_available() else ("none",))]
#: Threads and blocks in three orders, and both GPU backends.
target = pytest.fixture(_target, params=[*(pytest.param(("emulated", how), id=how) for how in ORDERS), *_ON_GPU], name="target")
#: One order: for what no order can change, or what takes long.
quick = pytest.fixture(_target, params=[pytest.param(("emulated", "shuffled"), id="shuffled"), *_ON_GPU], name="quick")
