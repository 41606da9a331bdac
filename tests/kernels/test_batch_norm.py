"""Batch norm with residual and activation in Triton, against dense torch."""

from __future__ import annotations

import harness
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mwm import ops

SHAPES = [(3, 5, 2, 2), (40, 64, 4, 4), (7, 70, 3, 3), (20, 130, 1, 1), (90, 1, 2, 2), (1, 16, 2, 1)]
ACTIVATE = {None: lambda x: x, "relu": F.relu, "relu6": F.relu6}


def _oracle(activation: str | None):
    def dense(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        out = F.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-5)
        return ACTIVATE[activation](out if residual is None else out + residual)

    return dense


def _ours(activation: str | None, device: str):
    def packed(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        x, weight, bias, residual = (t if t is None else t.to(device) for t in (x, weight, bias, residual))
        mean, var = ops.batch_moments(x, backend="triton")
        return ops.batch_norm(x, mean, var, weight, bias, residual=residual, activation=activation, backend="triton").cpu()

    return packed


def _inputs(shape: tuple[int, ...], affine: bool, residual: bool) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = (3 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64)).contiguous(memory_format=torch.channels_last)
    row = [1 + 0.3 * torch.randn(shape[1], generator=generator, dtype=torch.float64) if affine else None for _ in range(2)]
    return [x, *row, torch.randn(shape, generator=generator, dtype=torch.float64) if residual else None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("affine", "residual", "activation"), [(True, True, "relu"), (True, False, None), (False, True, "relu6"), (True, False, "relu")])
def test_value_and_gradients_are_those_of_dense_batch_norm(shape: tuple[int, ...], affine: bool, residual: bool, activation: str | None, device: str) -> None:
    harness.check(_ours(activation, device), _oracle(activation), _inputs(shape, affine, residual), threads=(1,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATE)
def test_half_maps_with_float32_parameters_round_once(dtype: torch.dtype, activation: str | None, device: str) -> None:
    x, weight, bias, residual = _inputs((20, 70, 3, 3), True, True)
    x, residual, weight, bias = x.to(dtype), residual.to(dtype), weight.float(), bias.float()
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
    truths = [t.double().requires_grad_() for t in (x, weight, bias, residual)]
    out, truth = _ours(activation, device)(*leaves), _oracle(activation)(*truths)
    eps = torch.finfo(dtype).eps
    assert out.dtype == dtype
    ulps = 1.01 if device == "cpu" and dtype == torch.bfloat16 else 0.51  # the interpreter cuts off where a GPU rounds
    assert ((out.double() - truth).abs() <= ulps * eps * truth.abs() + 1e-5).all()
    # The mask of the rounded result is that of the exact one except next to a kink.
    grad = torch.randn(out.shape).to(dtype) * ((truth.abs() > 0.05) & ((truth - 6).abs() > 0.05))
    found, want = torch.autograd.grad(out, leaves, grad), torch.autograd.grad(truth, truths, grad.double())
    for mine, other in zip(found, want, strict=True):
        assert (mine.double() - other).norm() <= 2 * eps * other.norm() + 1e-4


def test_moments_move_the_running_ones_like_torch(device: str) -> None:
    x = harness.integers((64, 9, 4, 4), torch.Generator().manual_seed(3)).float()
    mine, torchs = torch.nn.BatchNorm2d(9, momentum=0.3).to(device), torch.nn.BatchNorm2d(9, momentum=0.3)
    version = mine.running_mean._version
    mean, var = ops.batch_moments(x.to(device), mine.running_mean, mine.running_var, momentum=0.3, backend="triton")
    torchs(x)
    torch.testing.assert_close(mean.cpu(), x.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(var.cpu(), x.double().var((0, 2, 3), correction=0).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(mine.running_mean.cpu(), torchs.running_mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(mine.running_var.cpu(), torchs.running_var, rtol=1e-6, atol=0)
    assert mine.running_mean._version > version


def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(device: str) -> None:
    x = (1000 + torch.randn(700, 20, 2, 2, generator=torch.Generator().manual_seed(5))).contiguous(memory_format=torch.channels_last)
    mean, var = ops.batch_moments(x.to(device), backend="triton")
    torch.testing.assert_close(var.cpu().double(), x.double().var((0, 2, 3), correction=0), rtol=2e-6, atol=0)
    torch.testing.assert_close(mean.cpu().double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)


def test_nan_reaches_its_own_channel_only_and_passes_the_activation(device: str) -> None:
    x = torch.randn(40, 20, 2, 2).contiguous(memory_format=torch.channels_last)
    x[3, 7, 0, 1] = float("nan")
    for activation in ("relu", "relu6"):
        out = _ours(activation, device)(x, None, None, None)
        assert out.isnan().any(0).any(-1).any(-1).tolist() == [c == 7 for c in range(20)]


def test_only_the_gradients_that_are_asked_for_are_made(device: str) -> None:
    inputs = [t.float() for t in _inputs((6, 4, 2, 2), True, True)]
    for number in range(4):
        leaves = [t.clone().requires_grad_(i == number) for i, t in enumerate(inputs)]
        (found,) = torch.autograd.grad(_ours("relu", device)(*leaves).square().sum(), [leaves[number]])
        (want,) = torch.autograd.grad(_oracle("relu")(*leaves).square().sum(), [leaves[number]])
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_maps_that_are_not_channels_last_are_read_right(device: str) -> None:
    x, weight, bias, residual = (t.float() for t in _inputs((6, 4, 3, 3), True, True))
    ours = _ours("relu", device)
    assert torch.equal(ours(x.contiguous(), weight, bias, residual.contiguous()), ours(x, weight, bias, residual))


def test_the_second_derivative_is_torchs(device: str) -> None:
    x = _inputs((4, 3, 2, 2), False, False)[0].float().to(device).requires_grad_()
    (first,) = torch.autograd.grad(_ours(None, device)(x, None, None, None).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    y = x.detach().cpu().double().requires_grad_()
    (other,) = torch.autograd.grad(_oracle(None)(y, None, None, None).pow(3).sum(), y, create_graph=True)
    (want,) = torch.autograd.grad(other.square().sum(), y)
    torch.testing.assert_close(second.cpu().double(), want, rtol=1e-3, atol=1e-3)
