"""Batch norm of the CUDA sources, with residual and activation, against dense torch."""

from __future__ import annotations

import harness
import pytest
import torch
import torch.nn.functional as F
from emulator import Target
from torch import Tensor

from mwm import ops

# Rows of 16 bytes and others; one share and several; more lanes than channels; fewer rows than groups.
SHAPES = [(3, 5, 2, 2), (40, 64, 4, 4), (7, 70, 3, 3), (20, 136, 1, 1), (90, 1, 2, 2), (1, 16, 2, 1), (70, 96, 3, 3), (33, 512, 1, 1)]
FORMS = [(True, True, "relu"), (True, False, None), (False, True, "relu6"), (True, False, "relu")]
ACTIVATE = {None: lambda x: x, "relu": F.relu, "relu6": F.relu6}


def _oracle(activation: str | None):
    def dense(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        out = F.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-5)
        return ACTIVATE[activation](out if residual is None else out + residual)

    return dense


def _ours(activation: str | None, target: Target):
    def packed(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        x, weight, bias, residual = (t if t is None else t.to(target.device) for t in (x, weight, bias, residual))
        mean, var = ops.batch_moments(x, backend=target.backend)
        return ops.batch_norm(x, mean, var, weight, bias, residual=residual, activation=activation, backend=target.backend).cpu()

    return packed


def _inputs(shape: tuple[int, ...], affine: bool = True, residual: bool = True) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = (3 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64)).contiguous(memory_format=torch.channels_last)
    row = [1 + 0.3 * torch.randn(shape[1], generator=generator, dtype=torch.float64) if affine else None for _ in range(2)]
    return [x, *row, torch.randn(shape, generator=generator, dtype=torch.float64) if residual else None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("affine", "residual", "activation"), FORMS)
def test_value_and_gradients_are_those_of_dense_batch_norm(shape: tuple[int, ...], affine: bool, residual: bool, activation: str | None, quick: Target) -> None:
    quick.require("batch_norm")
    harness.check(_ours(activation, quick), _oracle(activation), _inputs(shape, affine, residual), threads=(1,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [64, 70])
@pytest.mark.parametrize("activation", ACTIVATE)
def test_half_maps_with_float32_parameters_round_once(activation: str | None, channels: int, dtype: torch.dtype, quick: Target) -> None:
    quick.require("batch_norm", dtype)
    x, weight, bias, residual = _inputs((20, channels, 3, 3))
    x, residual, weight, bias = x.to(dtype), residual.to(dtype), weight.float(), bias.float()
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
    truths = [t.double().requires_grad_() for t in (x, weight, bias, residual)]
    out, truth = _ours(activation, quick)(*leaves), _oracle(activation)(*truths)
    eps = torch.finfo(dtype).eps
    assert out.dtype == dtype
    assert ((out.double() - truth).abs() <= 0.51 * eps * truth.abs() + 1e-5).all()
    # The mask of the rounded result is that of the exact one except next to a kink.
    grad = torch.randn(out.shape).to(dtype) * ((truth.abs() > 0.05) & ((truth - 6).abs() > 0.05))
    found, want = torch.autograd.grad(out, leaves, grad), torch.autograd.grad(truth, truths, grad.double())
    for mine, other in zip(found, want, strict=True):
        assert (mine.double() - other).norm() <= 2 * eps * other.norm() + 1e-4


@pytest.mark.parametrize("channels", [64, 9])
def test_moments_move_the_running_ones_like_torch_in_any_order_of_threads(channels: int, target: Target) -> None:
    target.require("batch_norm")
    x = harness.integers((64, channels, 4, 4), torch.Generator().manual_seed(3)).float()
    mine, torchs = torch.nn.BatchNorm2d(channels, momentum=0.3).to(target.device), torch.nn.BatchNorm2d(channels, momentum=0.3)
    version = mine.running_mean._version
    mean, var = ops.batch_moments(x.to(target.device), mine.running_mean, mine.running_var, momentum=0.3, backend=target.backend)
    torchs(x)
    torch.testing.assert_close(mean.cpu(), x.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(var.cpu(), x.double().var((0, 2, 3), correction=0).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(mine.running_mean.cpu(), torchs.running_mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(mine.running_var.cpu(), torchs.running_var, rtol=1e-6, atol=0)
    assert mine.running_mean._version > version


def test_results_repeat_bit_for_bit_in_any_order_of_threads(target: Target, request: pytest.FixtureRequest) -> None:
    """The sums of random numbers show every change of order."""
    target.require("batch_norm")
    inputs = [t.float() for t in _inputs((70, 96, 3, 3))]
    found = []
    for order in (0, 1, 2):
        if target.device.type == "cpu":
            request.getfixturevalue("emulated").set_order(order)
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = _ours("relu", target)(*leaves)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(quick: Target) -> None:
    quick.require("batch_norm")
    x = (1000 + torch.randn(700, 20, 2, 2, generator=torch.Generator().manual_seed(5))).contiguous(memory_format=torch.channels_last)
    mean, var = ops.batch_moments(x.to(quick.device), backend=quick.backend)
    torch.testing.assert_close(var.cpu().double(), x.double().var((0, 2, 3), correction=0), rtol=2e-6, atol=0)
    torch.testing.assert_close(mean.cpu().double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)


def test_nan_and_infinity_reach_their_own_channel_only_and_pass_the_activation(quick: Target) -> None:
    quick.require("batch_norm")
    x = torch.randn(40, 24, 2, 2).contiguous(memory_format=torch.channels_last)
    x[3, 7, 0, 1], x[0, 9, 0, 0] = torch.nan, torch.inf
    for activation in ("relu", "relu6"):
        out = _ours(activation, quick)(x, None, None, None)
        assert out.isnan().any(0).any(-1).any(-1).tolist() == [c in (7, 9) for c in range(24)]


def test_only_the_gradients_that_are_asked_for_are_made(quick: Target) -> None:
    quick.require("batch_norm")
    inputs = [t.float() for t in _inputs((6, 4, 2, 2))]
    for number in range(4):
        leaves = [t.clone().requires_grad_(i == number) for i, t in enumerate(inputs)]
        (found,) = torch.autograd.grad(_ours("relu", quick)(*leaves).square().sum(), [leaves[number]])
        (want,) = torch.autograd.grad(_oracle("relu")(*leaves).square().sum(), [leaves[number]])
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_rows_and_maps_that_do_not_begin_at_16_bytes_are_read_right(quick: Target) -> None:
    quick.require("batch_norm")
    x, weight, bias, residual = (t.float() for t in _inputs((6, 8, 3, 3)))
    ours = _ours("relu", quick)
    shifted = torch.empty(x.numel() + 1)[1:].view(6, 3, 3, 8).permute(0, 3, 1, 2).copy_(x)
    rows = [torch.empty(9)[1:].copy_(row) for row in (weight, bias)]
    expected = ours(x, weight, bias, residual)
    assert shifted.data_ptr() % 16 and rows[0].data_ptr() % 16
    for value in (ours(shifted, weight, bias, residual), ours(x, *rows, residual), ours(x.contiguous(), weight, bias, residual.contiguous())):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
