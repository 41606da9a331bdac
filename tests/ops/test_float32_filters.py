"""Under autocast on the CPU the kernels read float32 filters: the bits of filters cast first, and derivatives that were never rounded."""

from __future__ import annotations

from collections.abc import Callable

import harness
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mwm import ops
from mwm.ops.pointwise_conv import pointwise_conv

HALVES = [torch.bfloat16, torch.float16]
PLAN = ops.build_plan(harness.masks()["mixed"], 4)


def _tiles(channels: int, edge: int = 4) -> Tensor:
    return torch.randn(PLAN.num_tiles, channels, edge, edge).contiguous(memory_format=torch.channels_last)


# Every path of the filters' packing: whole squares of four, rest lanes, odd inputs, joined groups, stems, depthwise, minimal filtering.
TILE_CONVS = {
    "whole panels": (64, (64, 64, 3, 3), {"padding": 1}),
    "rest lanes": (40, (24, 40, 3, 3), {"padding": 1, "dilation": 1}),
    "few rows of large filters": (512, (512, 512, 2, 2), {"stride": 2, "padding": 0}),
    "odd inputs": (7, (10, 7, 3, 3), {"padding": 1}),
    "joined groups": (32, (32, 4, 3, 3), {"padding": 1, "groups": 8}),
    "stem": (3, (16, 3, 7, 7), {"padding": 3, "stride": 2}),
    "depthwise": (24, (24, 1, 3, 3), {"padding": 1, "groups": 24}),
    "1x1 with stride": (64, (128, 64, 1, 1), {"stride": 2}),
}


def _both(op: Callable[..., Tensor], x: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients under autocast, and of tensors that were cast before. In the order out, x, weight."""
    found = []
    for inside in (True, False):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=inside):
            out = op(a, w) if inside else op(a.to(dtype), w.to(dtype))
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype).contiguous(memory_format=torch.channels_last)
        out.backward(grad)
        found.append([out.detach(), a.grad, w.grad])
    return found[0], found[1]


def _check(op: Callable[..., Tensor], x: Tensor, weight: Tensor, dtype: torch.dtype, *, finer: bool) -> None:
    mine, cast = _both(op, x, weight, dtype)
    assert mine[0].dtype == dtype and mine[2].dtype == torch.float32
    assert torch.equal(mine[0], cast[0]) and torch.equal(mine[1], cast[1])
    if finer:  # the same sums, rounded once less
        assert torch.equal(mine[2].to(dtype), cast[2].to(dtype))
        assert not torch.equal(mine[2], cast[2])
    else:
        assert torch.equal(mine[2], cast[2])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", TILE_CONVS)
def test_tile_conv_under_autocast_has_the_bits_of_filters_cast_first(case: str, dtype: torch.dtype, isa: str) -> None:
    channels, shape, options = TILE_CONVS[case]
    for layout in (torch.channels_last, torch.contiguous_format):
        weight = torch.randn(shape).contiguous(memory_format=layout)
        _check(lambda x, w: ops.tile_conv(x, w, None, PLAN, **options), _tiles(channels), weight, dtype, finer=case != "depthwise")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_dense_3x3_under_autocast_has_the_bits_of_filters_cast_first(dtype: torch.dtype, isa: str) -> None:
    x = torch.randn(2, 40, 16, 12).contiguous(memory_format=torch.channels_last)
    for layout in (torch.channels_last, torch.contiguous_format):
        _check(ops.conv3x3, x, torch.randn(24, 40, 3, 3).contiguous(memory_format=layout), dtype, finer=True)


@pytest.mark.parametrize("edge", [4, 16])
def test_doubling_convolution_under_autocast_has_the_bits_of_filters_cast_first(edge: int) -> None:
    x = torch.randn(2, 32, edge, edge).contiguous(memory_format=torch.channels_last)
    _check(ops.conv_transpose4x4, x, torch.randn(32, 16, 4, 4), torch.bfloat16, finer=edge == 4)


@pytest.mark.parametrize("filters", [64, 256], ids=["all products", "the filters' gradient"])
def test_pointwise_conv_of_few_rows_does_not_round_its_filters_gradient(filters: int, isa: str) -> None:
    x = torch.randn(40, 128, 1, 1).contiguous(memory_format=torch.channels_last)
    _check(pointwise_conv, x, torch.randn(filters, 128, 1, 1), torch.bfloat16, finer=True)


def test_values_that_a_half_type_rounds_specially_come_out_as_from_a_cast(isa: str) -> None:
    """Ties, subnormals, infinities of float32 values too large for the type, and NaN."""
    special = torch.tensor([1.00390625, 1.01171875, 1e-40, -1e-40, 3.4e38, -3.4e38, 65519.0, 65520.0, 6e-8, 3e-8, float("inf"), float("nan")])
    weight = special.repeat(64 * 64 // len(special) + 1)[: 64 * 64].view(64, 64, 1, 1)
    x = torch.zeros(PLAN.num_tiles, 64, 4, 4).contiguous(memory_format=torch.channels_last)
    for place in range(64):
        x[place % len(x), place] = 1.0
    for dtype in HALVES:
        with torch.autocast("cpu", dtype):
            out = ops.tile_conv(x, weight, None, PLAN, stride=2)
        assert torch.equal(out.isnan(), ops.tile_conv(x.to(dtype), weight.to(dtype), None, PLAN, stride=2).isnan())
        assert torch.equal(out.nan_to_num(), ops.tile_conv(x.to(dtype), weight.to(dtype), None, PLAN, stride=2).nan_to_num())


def test_without_autocast_mixed_dtypes_are_refused() -> None:
    x, weight = _tiles(8).bfloat16(), torch.randn(8, 8, 3, 3)
    with pytest.raises(TypeError, match="weight must have the dtype of x"):
        ops.tile_conv(x, weight, None, PLAN, padding=1)
    assert F.conv2d(x.float(), weight, padding=1).dtype == torch.float32


def test_autocast_keeps_no_copy_of_float32_filters() -> None:
    weight, kept = torch.randn(64, 64, 3, 3, requires_grad=True), []
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.tile_conv(_tiles(64), weight, None, PLAN, padding=1)
    assert any(t.data_ptr() == weight.data_ptr() for t in kept)
    assert not any(t.shape == weight.shape and t.dtype == torch.bfloat16 for t in kept)
