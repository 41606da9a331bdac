"""Depthwise `tile_conv` in Triton against dense conv2d on the unpacked map."""

from __future__ import annotations

from collections.abc import Callable

import harness
import pytest
import torch
from conv_cases import Conv
from torch import Tensor

from mwm import ops

ACTIVE = torch.tensor([[[1, 0, 1], [0, 1, 1]], [[0, 0, 0], [0, 0, 0]], [[1, 1, 0], [1, 0, 0]]], dtype=torch.bool)
FEW = torch.tensor([[[1, 1, 0], [0, 1, 0]], [[0, 0, 0], [0, 0, 0]]], dtype=torch.bool)  # for large tiles

DEPTHWISE = {
    "5x5 t4": Conv(5, 5, (5, 5), 4, padding=2, groups=5),
    "7x7 t1": Conv(9, 9, (7, 7), 1, padding=3, groups=9),
    "5x5/2": Conv(8, 8, (5, 5), 4, stride=2, padding=2, groups=8, bias=False),
    "3x3/2 same": Conv(5, 5, (3, 3), 2, stride=2, padding=(0, 1, 0, 1), groups=5),
    "3x3 dilated": Conv(3, 3, (3, 3), 3, padding=2, dilation=2, groups=3),
    "3x3 t2": Conv(9, 9, (3, 3), 2, padding=1, groups=9),
    "3x1 t1": Conv(70, 70, (3, 1), 1, padding=(1, 0), groups=70),
}


def _run(conv: Conv, plan: ops.TilePlan, device: str) -> Callable[..., Tensor]:
    moved = conv.run(plan.to(device), "triton")
    return lambda *inputs: moved(*(None if x is None else x.to(device) for x in inputs)).cpu()


@pytest.mark.parametrize("case", DEPTHWISE)
def test_small_integers_are_exact(case: str, device: str) -> None:
    conv = DEPTHWISE[case]
    plan = ops.build_plan(ACTIVE if conv.edge < 4 else FEW, conv.edge)
    harness.check(_run(conv, plan, device), conv.oracle(plan), conv.inputs(plan, exact=True), exact=True, threads=(1,))


@pytest.mark.parametrize("name", [name for name in harness.masks() if name not in ("mixed", "square 7")])
def test_every_mask_is_exact(name: str, device: str) -> None:
    conv = DEPTHWISE["3x3 t2"]
    plan = ops.build_plan(harness.masks()[name], conv.edge)
    harness.check(_run(conv, plan, device), conv.oracle(plan), conv.inputs(plan, exact=True), exact=True, threads=(1,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["3x3 t2", "3x3 dilated"])
def test_error_stays_within_the_budget_of_dense_torch(case: str, dtype: torch.dtype, device: str) -> None:
    conv = DEPTHWISE[case]
    plan = ops.build_plan(ACTIVE if conv.edge < 4 else FEW, conv.edge)
    harness.check(_run(conv, plan, device), conv.oracle(plan), conv.inputs(plan), dtype=dtype, threads=(1,))


def test_tiles_beyond_the_reach_of_a_window_are_not_read(device: str) -> None:
    conv = DEPTHWISE["3x3 t2"]
    plan = ops.build_plan(torch.tensor([[[1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]]]).bool(), conv.edge)
    x, weight, bias = (tensor.float() for tensor in conv.inputs(plan))
    run = _run(conv, plan, device)
    clean = run(x, weight, bias)
    x[1] = torch.nan
    found = run(x, weight, bias)
    assert found[1].isnan().any() and found[2].isnan().any()
    assert torch.equal(found[[0, 3, 4]], clean[[0, 3, 4]])


def test_every_element_is_written(device: str) -> None:
    conv = DEPTHWISE["3x3/2 same"]
    plan = ops.build_plan(ACTIVE if conv.edge < 4 else FEW, conv.edge)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty gives NaN
    try:
        harness.check(_run(conv, plan, device), conv.oracle(plan), conv.inputs(plan, exact=True), exact=True, threads=(1,))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
