from __future__ import annotations

import harness
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mwm import ops

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(3, 5, 2, 2), (160, 64, 4, 4), (7, 70, 3, 3), (20, 130, 1, 1), (20, 1, 2, 2), (70, 16, 8, 8), (40, 48, 4, 4), (36, 288, 3, 3)]
ACTIVATE = {None: lambda x: x, "relu": F.relu, "relu6": F.relu6}


def _oracle(activation: str | None, eps: float = 1e-5):
    def dense(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        wide = x.double() if x.dtype == torch.float64 else x
        out = F.batch_norm(wide, None, None, weight, bias, True, 0.0, eps)
        return ACTIVATE[activation](out if residual is None else out + residual)

    return dense


def _ours(activation: str | None, backend: str | None = None, eps: float = 1e-5):
    def packed(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        mean, var = ops.batch_moments(x, backend=backend)
        return ops.batch_norm(x, mean, var, weight, bias, eps=eps, residual=residual, activation=activation, backend=backend)

    return packed


def _inputs(shape: tuple[int, ...], affine: bool, residual: bool) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = 3 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last)
    row = [1 + 0.3 * torch.randn(shape[1], generator=generator, dtype=torch.float64) if affine else None for _ in range(2)]
    return [x, *row, torch.randn(shape, generator=generator, dtype=torch.float64) if residual else None]


@pytest.mark.parametrize(("affine", "residual", "activation"), [(True, True, "relu"), (True, False, None), (False, True, "relu6"), (True, False, "relu")])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32])
def test_value_and_gradients_are_those_of_dense_batch_norm(dtype: torch.dtype, shape: tuple[int, ...], affine: bool, residual: bool,
                                                           activation: str | None, isa: str) -> None:
    harness.check(_ours(activation), _oracle(activation), _inputs(shape, affine, residual), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_too_large_for_a_cache(dtype: torch.dtype, isa: str) -> None:
    """From 8 MiB on results are written past the caches: the same bits as in smaller pieces, and the right gradients."""
    x, weight, bias, residual = _inputs((70, 64, 24, 24) if dtype == torch.float32 else (130, 64, 24, 24), True, True)
    x, weight, bias, residual = x.to(dtype), weight.float(), bias.float(), residual.to(dtype)
    mean, var = ops.batch_moments(x)
    whole = ops.batch_norm(x, mean, var, weight, bias, residual=residual, activation="relu")
    assert whole.nbytes >= 8 << 20
    for piece in range(0, len(x), 30):
        part = slice(piece, piece + 30)
        assert torch.equal(whole[part], ops.batch_norm(x[part], mean, var, weight, bias, residual=residual[part], activation="relu"))
    if dtype == torch.float32:
        harness.check(_ours("relu"), _oracle("relu"), _inputs(tuple(x.shape), True, True), dtype=dtype)


@pytest.mark.parametrize("activation", ACTIVATE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_maps_with_float32_parameters_round_once(dtype: torch.dtype, activation: str | None, isa: str) -> None:
    x, weight, bias, residual = _inputs((40, 70, 4, 4), True, True)
    x, residual = x.to(dtype), residual.to(dtype)
    weight, bias = weight.float(), bias.float()
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
    truths = [t.double().requires_grad_() for t in (x, weight, bias, residual)]
    out, truth = _ours(activation)(*leaves), _oracle(activation)(*truths)
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert ((out.double() - truth).abs() <= 0.51 * eps * truth.abs() + 1e-5).all()
    grad = torch.randn(out.shape).to(dtype)
    # The mask of the rounded result is that of the exact one except next to a kink.
    steady = (truth.abs() > 0.05) & ((truth - 6).abs() > 0.05)
    grad = grad * steady
    found = torch.autograd.grad(out, leaves, grad)
    want = torch.autograd.grad(truth, truths, grad.double())
    for mine, other in zip(found, want, strict=True):
        assert (mine.double() - other).norm() <= 2 * eps * other.norm() + 1e-4


def test_moments_are_exact_on_integers_and_move_the_running_ones_like_torch(isa: str) -> None:
    x = harness.integers((64, 9, 4, 4), torch.Generator().manual_seed(3)).float()
    mine, torchs = torch.nn.BatchNorm2d(9, momentum=0.3), torch.nn.BatchNorm2d(9, momentum=0.3)
    mean, var = ops.batch_moments(x, mine.running_mean, mine.running_var, momentum=0.3)
    torchs(x)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(var, x.double().var((0, 2, 3), correction=0).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(mine.running_mean, torchs.running_mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(mine.running_var, torchs.running_var, rtol=1e-6, atol=0)


def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(isa: str) -> None:
    x = (1000 + torch.randn(4000, 20, 2, 2, generator=torch.Generator().manual_seed(5))).contiguous(memory_format=torch.channels_last)
    mean, var = ops.batch_moments(x)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), correction=0), rtol=2e-6, atol=0)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)


def test_nan_reaches_its_own_channel_only(isa: str) -> None:
    x = torch.randn(40, 20, 2, 2).contiguous(memory_format=torch.channels_last)
    x[3, 7, 0, 1] = float("nan")
    out = _ours("relu")(x, None, None, None)
    bad = out.isnan().any(0).any(-1).any(-1)
    assert bad[7] and bad.sum() == 1


@pytest.mark.parametrize("activation", [None, "relu6"])
def test_gradcheck(activation: str | None) -> None:
    x, weight, bias, residual = _inputs((4, 3, 2, 2), True, True)
    inputs = [t.requires_grad_() for t in (x, weight, bias, residual)]
    assert torch.autograd.gradcheck(_ours(activation), inputs)
    assert torch.autograd.gradgradcheck(_ours(activation), inputs)


def test_only_the_gradients_that_are_asked_for_are_made() -> None:
    x, weight, bias, residual = _inputs((6, 4, 2, 2), True, True)
    weight.requires_grad_()
    (found,) = torch.autograd.grad(_ours("relu")(x, weight, bias, residual).sum(), [weight])
    (want,) = torch.autograd.grad(_oracle("relu")(x, weight, bias, residual).sum(), [weight])
    torch.testing.assert_close(found, want)


def test_backends_agree_and_errors_say_what_to_do() -> None:
    inputs = [None if t is None else t.float() for t in _inputs((6, 4, 3, 3), True, True)]
    torch.testing.assert_close(_ours("relu")(*inputs), _ours("relu", "reference")(*inputs), rtol=1e-5, atol=1e-6)
    x = inputs[0]
    mean, var = ops.batch_moments(x)
    with pytest.raises(ValueError, match=r'activation must be "relu", "relu6" or None, got \'gelu\''):
        ops.batch_norm(x, mean, var, activation="gelu")
    with pytest.raises(ValueError, match=r"residual must be torch.float32 \[6, 4, 3, 3\] as x, got torch.float32 \[6, 4, 3, 2\]"):
        ops.batch_norm(x, mean, var, residual=x[..., :2])
    with pytest.raises(ValueError, match=r"weight must be \[C\] with C = 4"):
        ops.batch_norm(x, mean, var, torch.ones(3))
    with pytest.raises(ValueError, match="two positions or more"):
        ops.batch_moments(x[:1, :, :1, :1])
    with pytest.raises(ValueError, match="both be given or both be None"):
        ops.batch_moments(x, mean)
    with pytest.raises(ops.BackendError, match="cuda"):
        ops.batch_moments(x, backend="cuda")
