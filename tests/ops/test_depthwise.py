"""Depthwise `tile_conv` against dense conv2d on the unpacked map."""

from __future__ import annotations

from collections.abc import Iterator

import harness
import pytest
import torch
from conv_cases import DEPTHWISE, MASKS, Conv

from mwm import ops


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small work: the harness sets the numbers of threads where they matter."""
    with harness.num_threads(1):
        yield


@pytest.mark.parametrize("case", DEPTHWISE)
def test_small_integers_are_exact_on_every_instruction_set(case: str, isa: str) -> None:
    conv = DEPTHWISE[case]
    plan = ops.build_plan(MASKS["mixed"], conv.edge)
    harness.check(conv.run(plan, "cpu"), conv.oracle(plan), conv.inputs(plan, exact=True), exact=True, threads=(1, 2))


@pytest.mark.parametrize("name", [name for name in MASKS if name != "mixed"])
@pytest.mark.parametrize("case", ["7x7 t8 37", "7x7 t1 37", "3x3 stride 2 37"])
def test_every_mask_is_exact(case: str, name: str) -> None:
    conv = DEPTHWISE[case]
    plan = ops.build_plan(MASKS[name], conv.edge)
    harness.check(conv.run(plan, "cpu"), conv.oracle(plan), conv.inputs(plan, exact=True), exact=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["7x7 t8 37", "7x7 t1 96", "5x5 stride 2 96"])
def test_error_stays_within_the_budget_of_dense_torch(case: str, dtype: torch.dtype, isa: str) -> None:
    conv = DEPTHWISE[case]
    plan = ops.build_plan(MASKS["square 7"], conv.edge)
    harness.check(conv.run(plan, "cpu"), conv.oracle(plan), conv.inputs(plan), dtype=dtype, threads=(1,))


def test_depthwise_equals_the_grouped_path_bit_for_bit_on_integers() -> None:
    """Two filters per channel take the general path; its even filters are the depthwise ones."""
    plan = ops.build_plan(MASKS["square 7"], 4)
    conv = Conv(24, 24, (5, 5), 4, padding=2, groups=24)
    x, weight, _ = (tensor.float() for tensor in conv.inputs(plan, exact=True))
    double = torch.stack([weight, -weight], 1).flatten(0, 1)
    got = ops.tile_conv(x, double, None, plan, padding=2, groups=24)
    assert torch.equal(got[:, ::2], ops.tile_conv(x, weight, None, plan, padding=2, groups=24))


def test_gradcheck() -> None:
    conv = Conv(5, 5, (5, 3), 2, 2, (1, 1, 2, 2), 1, 5)
    plan = ops.build_plan(torch.tensor([[[1, 0, 1]], [[0, 1, 1]]]).bool(), conv.edge)
    assert torch.autograd.gradcheck(conv.run(plan), [x.requires_grad_() for x in conv.inputs(plan)])
