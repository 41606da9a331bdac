"""1x1 and patchify convolutions as matrix products of the packed rows: what runs them on a GPU, tried on the CPU."""

from __future__ import annotations

import harness
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mwm.ops import patch_gemm, tile_conv_gpu
from mwm.ops.pointwise_conv import _linear

CASES = [(5, 6, 7, 4, 1), (3, 3, 8, 8, 4), (4, 5, 6, 4, 2), (6, 4, 3, 1, 1), (2, 1, 4, 2, 2), (0, 3, 4, 4, 2)]


@pytest.mark.parametrize(("tiles", "channels", "filters", "edge", "step"), CASES)
@pytest.mark.parametrize("last", [False, True])
def test_value_and_gradients_are_those_of_conv2d(tiles: int, channels: int, filters: int, edge: int, step: int, last: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (tiles, channels, edge, edge), (filters, channels, step, step), (filters,)
    x, weight, bias = (harness.integers(shape, generator, density=0.9) for shape in shapes)
    if last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    grad = harness.integers((tiles, filters, edge // step, edge // step), generator)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = F.conv2d(*leaves, stride=step)
    wanted = torch.autograd.grad(out, leaves, grad)
    found = patch_gemm.forward(x, weight, bias), patch_gemm.grad_input(grad, weight), patch_gemm.grad_weight(grad, x, step)
    for mine, other in zip(found, (out, *wanted[:2]), strict=True):
        assert torch.equal(mine, other)
        assert mine.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(patch_gemm.forward(x, weight, None), F.conv2d(x, weight, None, step))
    assert torch.equal(tile_conv_gpu.grad_bias("triton", grad.float()), wanted[2].float())


@pytest.mark.parametrize(("kernel", "geometry", "fits"), [
    ((1, 1), [1, 1, 1, 0, 0, 0, 0, 1], True),
    ((4, 4), [4, 1, 1, 0, 0, 0, 0, 1], True),
    ((1, 1), [1, 2, 2, 0, 0, 0, 0, 1], True),
    ((1, 1), [2, 1, 1, 0, 0, 0, 0, 1], False),
    ((2, 2), [2, 2, 2, 1, 0, 1, 0, 1], False),
    ((2, 2), [2, 1, 2, 0, 0, 0, 0, 1], False),
    ((1, 1), [1, 1, 1, 0, 0, 0, 0, 2], False),
    ((3, 3), [1, 1, 1, 1, 1, 1, 1, 1], False),
])
def test_only_windows_that_stay_in_their_tile_and_do_not_overlap_fit(kernel: tuple[int, int], geometry: list[int], fits: bool) -> None:
    assert patch_gemm.fits(kernel, geometry) == fits


def test_a_1x1_convolution_of_rows_is_that_of_conv2d_with_second_derivatives() -> None:
    x = torch.randn(6, 9, 2, 2, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(5, 9, 1, 1, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64, requires_grad=True)

    def second(function) -> list[Tensor]:
        (first,) = torch.autograd.grad(function(x, weight, bias).square().sum(), x, create_graph=True)
        return [first, *torch.autograd.grad(first.square().sum(), [x, weight])]

    for mine, other in zip(second(_linear), second(F.conv2d), strict=True):
        torch.testing.assert_close(mine, other)
    assert _linear(x, weight, bias).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("geometry", [[1, 1, 1, 1, 1, 1, 1, 1], [2, 1, 1, 0, 1, 0, 1, 1], [1, 2, 2, 2, 2, 2, 2, 2]])
@pytest.mark.parametrize("edge", [2, 4])
def test_the_dense_way_equals_the_oracle(geometry: list[int], edge: int) -> None:
    from mwm import ops
    from mwm.ops import reference_conv

    plan = ops.build_plan(harness.masks()["mixed"], edge)
    generator = torch.Generator().manual_seed(0)
    x, weight = harness.integers((plan.num_tiles, 6, edge, edge), generator), harness.integers((4, 6 // geometry[7], 3, 3), generator)
    grad = harness.integers((plan.num_tiles, 4, edge // geometry[0], edge // geometry[0]), generator)
    place = plan.tensors()[:3]
    assert torch.equal(tile_conv_gpu.forward("dense", x, weight, None, place, geometry, grad), reference_conv.forward(x, weight, None, plan.active, geometry))
    assert torch.equal(tile_conv_gpu.grad_input("dense", grad, weight, place, geometry, x),
                       reference_conv.grad_input(grad, weight, plan.active, geometry, edge))
    assert torch.equal(tile_conv_gpu.grad_weight("dense", grad, x, place, geometry, weight),
                       reference_conv.grad_weight(grad, x, plan.active, geometry, [3, 3]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
@pytest.mark.parametrize(("kernel", "edge", "stride", "groups"), [(1, 2, 1, 1), (4, 8, 4, 1), (2, 2, 2, 1), (3, 4, 1, 1), (3, 4, 2, 1), (7, 2, 1, 8), (3, 2, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_automatic_way_on_a_gpu_equals_the_oracle(kernel: int, edge: int, stride: int, groups: int, dtype: torch.dtype) -> None:
    from conv_cases import Conv

    from mwm import ops

    padding = 0 if kernel == stride else (kernel - 1) // 2
    conv = Conv(8, 8, (kernel, kernel), edge, stride, padding, groups=groups)
    plan = ops.build_plan(harness.masks()["mixed"], edge)
    on_gpu = conv.run(plan.to("cuda"))
    harness.check(lambda *inputs: on_gpu(*(x.cuda() for x in inputs)).cpu(), conv.oracle(plan), conv.inputs(plan, exact=True), dtype=dtype, exact=True, threads=(1,))
