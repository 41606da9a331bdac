from __future__ import annotations

from collections.abc import Callable

import harness
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mwm.ops.pointwise_conv import pointwise_conv

CASES = [(40, 96, 64, 1), (40, 64, 96, 1), (17, 70, 65, 1), (9, 12, 7, 1), (6, 16, 24, 2), (20, 64, 96, 2), (3, 8, 5, 8), (1030, 70, 64, 1), (1030, 64, 70, 1)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients_are_those_of_conv2d(dtype: torch.dtype, case: tuple[int, int, int, int], bias: bool, isa: str) -> None:
    tiles, channels, filters, edge = case
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tiles, channels, edge, edge, generator=generator, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(filters, channels, 1, 1, generator=generator, dtype=torch.float64)
    inputs = [x, weight, torch.randn(filters, generator=generator, dtype=torch.float64) if bias else None]
    # With one thread torch takes another of its implementations, which rounds otherwise.
    harness.check(pointwise_conv, F.conv2d, inputs, dtype=dtype, threads=(2,))


def test_autocast_and_second_derivatives_are_those_of_conv2d() -> None:
    x = torch.randn(40, 96, 1, 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(64, 96, 1, 1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out, want = pointwise_conv(x, weight), F.conv2d(x, weight)
    assert out.dtype == want.dtype == torch.bfloat16
    grad = torch.randn_like(out)
    for mine, other in zip(torch.autograd.grad(out, [x, weight], grad), torch.autograd.grad(want, [x, weight], grad), strict=True):
        assert mine.dtype == other.dtype == torch.float32
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-1)
    (first,) = torch.autograd.grad(pointwise_conv(x, weight).square().sum(), x, create_graph=True)
    (other,) = torch.autograd.grad(F.conv2d(x, weight).square().sum(), x, create_graph=True)
    for mine, want in zip(torch.autograd.grad(first.square().sum(), [x, weight]), torch.autograd.grad(other.square().sum(), [x, weight]), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-3, atol=1e-2 * float(want.abs().max()))


@pytest.mark.parametrize("channels", [96, 48], ids=["the core", "torch"])
def test_a_second_derivative_under_autocast_reaches_the_weight_that_was_given(channels: int) -> None:
    x = torch.randn(40, channels, 1, 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(64, channels, 1, 1).requires_grad_()
    found = []
    for op in (pointwise_conv, F.conv2d):
        with torch.autocast("cpu", torch.bfloat16):
            out = op(x, weight)
        (first,) = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), weight)[0])
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], found[1], rtol=5e-2, atol=5e-2 * float(found[1].abs().max()))


def test_few_rows_give_the_same_bits_whatever_the_threads_and_the_graph() -> None:
    x = torch.randn(40, 96, 1, 1).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(64, 96, 1, 1), torch.randn(64)

    def run(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        out = pointwise_conv(*leaves)
        with torch.no_grad():
            assert torch.equal(pointwise_conv(*leaves), out)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    before = torch.get_num_threads()
    try:
        for one, two in zip(run(1), run(2), strict=True):
            assert torch.equal(one, two)
    finally:
        torch.set_num_threads(before)


def test_only_the_gradients_that_are_asked_for_are_made() -> None:
    x = torch.randn(40, 96, 1, 1).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(64, 96, 1, 1), torch.randn(64)
    for wanted in (0, 1, 2):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, weight, bias))]
        (mine,) = torch.autograd.grad(pointwise_conv(*leaves).square().sum(), leaves[wanted])
        (other,) = torch.autograd.grad(F.conv2d(*leaves).square().sum(), leaves[wanted])
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)


def test_what_follows_may_write_into_the_result() -> None:
    x = torch.randn(40, 96, 1, 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(64, 96, 1, 1).requires_grad_()
    (mine,) = torch.autograd.grad(F.relu_(pointwise_conv(x, weight)).sum(), x)
    (other,) = torch.autograd.grad(F.relu(F.conv2d(x, weight)).sum(), x)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [lambda w, b: (w.double(), b), lambda w, b: (w[:, :65], b), lambda w, b: (w, b[:63]), lambda w, b: (w, b.double())])
def test_what_does_not_fit_is_refused_as_torch_refuses_it(change: Callable) -> None:
    x, weight, bias = torch.randn(40, 96, 1, 1).contiguous(memory_format=torch.channels_last), torch.randn(64, 96, 1, 1), torch.randn(64)
    rows = x.permute(2, 1, 3, 0)  # as they are handed on
    with pytest.raises(RuntimeError) as want:
        F.conv2d(rows, *change(weight, bias))
    with pytest.raises(RuntimeError) as found:
        pointwise_conv(x, *change(weight, bias))
    assert str(found.value) == str(want.value)


def test_counters_of_arithmetic_see_the_product() -> None:
    x = torch.randn(40, 96, 1, 1).contiguous(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter:
        pointwise_conv(x, torch.randn(64, 96, 1, 1))
    assert counter.get_total_flops() == 2 * 40 * 96 * 64
