"""Batch norm in training with what usually follows it, a residual and a ReLU, in the same passes over memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gpu, native
from .backend import FLOATS, GPU_FLOATS, declare, resolve

declare("batch_norm", cpu=FLOATS, cuda=GPU_FLOATS, triton=GPU_FLOATS, reference=FLOATS)

ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2}


def batch_moments(
    x: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, *, momentum: float = 0.1, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and population variance of each channel; moves the running statistics as torch's batch norm does.

    Args:
        x: Packed tiles or any maps; at least two positions. float32 | bfloat16 | float16 | float64 [N, C, H, W]
        running_mean: Moved in place to (1 - momentum) * running_mean + momentum * mean, or None. [C]
        running_var: The same with the unbiased variance. [C]
        momentum: Share of this batch.
        backend: Forces an implementation; None picks the best.

    Returns:
        Mean and variance in float32 (float64 for float64 input). [C], [C]

    Raises:
        ValueError: x has fewer than two positions, or only one running statistic is given.
        BackendError: `backend` cannot run this input; the message lists the reasons.

    Not differentiable: `batch_norm` knows how its moments depend on x. Deterministic, whatever the number of threads. Deviations are
    summed from the mean of the first rows of a share, so a mean far from zero costs no digits of the variance.
    """
    _check_map("batch_moments", x)
    if _positions(x) < 2:
        raise ValueError(f"batch_moments: x must have two positions or more, got {list(x.shape)}.")
    if (running_mean is None) != (running_var is None):
        raise ValueError("batch_moments: running_mean and running_var must both be given or both be None.")
    x = x.detach()
    wide = _wide(x)
    name = resolve("batch_norm", backend or "", x)
    given = running_mean is None or (running_mean.dtype == wide and running_mean.is_contiguous() and running_var.dtype == wide and running_var.is_contiguous())
    if name == "reference" or not given:
        return _reference_moments(x, running_mean, running_var, momentum)
    x = _channels_last(x)
    mean, var = x.new_empty(x.shape[1], dtype=wide), x.new_empty(x.shape[1], dtype=wide)
    if name == "triton":
        with gpu.guard(x):
            gpu.triton_kernels("batch_norm").moments(x, mean, var, running_mean, running_var, momentum)
    elif name == "cuda":
        sums = _shares(x)
        rows = _row_views(x.shape[1], mean, var, running_mean, running_var)
        with gpu.guard(x):
            gpu.cuda().batch_norm_moments(native.view(x), native.view(sums), *rows, momentum, *gpu.launch(x))
    else:
        sums = _sums(x)
        native.core().batch_norm_moments(
            native.view(x), native.view(sums), native.view(mean), native.view(var), native.view(running_mean), native.view(running_var), momentum,
            native.threads(),
        )
    if running_mean is not None:
        # The core wrote behind torch's back; what saved them for backward must be told.
        torch.autograd.graph.increment_version((running_mean, running_var))
    return mean, var


def batch_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Normalise by the batch's own moments, add a residual, apply an activation: one pass forward, two backward.

    out = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

    Args:
        x: Packed tiles or any maps. float32 | bfloat16 | float16 | float64 [N, C, H, W]
        mean, var: `batch_moments(x)`. The derivative takes them as functions of x. [C]
        weight, bias: Or None. [C]
        eps: Added to the variance.
        residual: Added after the norm, same shape and dtype as x, or None.
        activation: "relu", "relu6" or None.
        backend: Forces an implementation; None picks the best.

    Returns:
        Same dtype as x, channels-last memory; computed in float32 (float64 for float64) and rounded once. [N, C, H, W]

    Raises:
        ValueError: Shapes differ, or the activation is unknown.
        BackendError: `backend` cannot run this input; the message lists the reasons.

    Differentiable in x, weight, bias and residual; the second derivative is torch's. Deterministic. Autocast leaves the dtype alone. For eager code: inductor fuses
    torch's own batch norm, so compiled code should call that.

    Source: Ioffe and Szegedy, Batch Normalization (arXiv 1502.03167), algorithm 1 and the derivative in §3.
    """
    _check_map("batch_norm", x)
    if activation not in ACTIVATIONS:
        raise ValueError(f'batch_norm: activation must be "relu", "relu6" or None, got {activation!r}.')
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"batch_norm: residual must be {x.dtype} {list(x.shape)} as x, got {residual.dtype} {list(residual.shape)}. Cast or slice it."
        )
    wide, channels = _wide(x), (x.shape[1],)
    for name, row in (("mean", mean), ("var", var), ("weight", weight), ("bias", bias)):
        if row is not None and row.shape != channels:
            raise ValueError(f"batch_norm: {name} must be [C] with C = {x.shape[1]} (the channels of x), got {list(row.shape)}.")
    name = resolve("batch_norm", backend or "", x)
    if name == "reference":
        out = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
        out = out if residual is None else out + residual
        return out if activation is None else F.relu(out) if activation == "relu" else F.relu6(out)
    weight, bias = _row(weight, wide), _row(bias, wide)
    return _BatchNorm.apply(x, mean.to(wide), var.to(wide), weight, bias, residual, eps, ACTIVATIONS[activation], name)


class _BatchNorm(torch.autograd.Function):
    """A plain Function: per call a registered op with autograd costs 100 µs more, as much as the norm of a deep layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float, activation: int,
        backend: str,
    ) -> Tensor:
        x = _channels_last(x)
        residual = None if residual is None else _channels_last(residual)
        out = torch.empty_like(x, memory_format=torch.channels_last)
        if backend == "triton":
            with gpu.guard(x):
                gpu.triton_kernels("batch_norm").apply(x, residual, weight, bias, mean, var, eps, activation, out)
        elif backend == "cuda":
            maps, rows = _map_views(x, residual, out), _row_views(x.shape[1], weight, bias, mean, var)
            with gpu.guard(x):
                gpu.cuda().batch_norm_apply(*maps[:2], *rows, eps, activation, maps[2], *gpu.launch(x))
        else:
            native.core().batch_norm_apply(
                *map(native.view, (x, residual, weight, bias, mean, var)), eps, activation, native.view(out), native.threads()
            )
        # Without a residual the mask of the activation is computed again from x, which saves reading the result twice.
        ctx.save_for_backward(x, out if activation and residual is not None else None, weight, bias, mean, var)
        ctx.eps, ctx.activation, ctx.backend = eps, activation, backend
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, out, weight, bias, mean, var = ctx.saved_tensors
        needs_x, _, _, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():
            return _differentiable(ctx, grad)
        grad = _channels_last(grad)
        grad_x = torch.empty_like(x) if needs_x else None
        # Without an activation the residual's gradient is that of the output.
        grad_residual = None if not needs_residual else torch.empty_like(x) if ctx.activation else grad
        if ctx.backend in ("triton", "cuda"):
            totals, sums = mean.new_empty((2, mean.shape[0])), None if ctx.backend == "triton" else _shares(x)
            of_residual = grad_residual if ctx.activation else None
            with gpu.guard(x):
                if ctx.backend == "triton":
                    gpu.triton_kernels("batch_norm").backward(grad, x, out, weight, bias, mean, var, ctx.eps, ctx.activation, totals, grad_x, of_residual)
                else:
                    maps, rows = _map_views(x, grad, out, grad_x, of_residual), _row_views(x.shape[1], weight, bias, mean, var)
                    gpu.cuda().batch_norm_backward(maps[1], maps[0], maps[2], *rows, ctx.eps, ctx.activation, native.view(sums), native.view(totals), *maps[3:], *gpu.launch(x))
            grad_bias, grad_weight = totals[0] if needs_bias else None, totals[1] if needs_weight else None
            return grad_x, None, None, grad_weight, grad_bias, grad_residual, None, None, None
        grad_weight = torch.empty_like(mean) if needs_weight else None
        grad_bias = torch.empty_like(mean) if needs_bias else None
        sums = _sums(x)
        native.core().batch_norm_backward(
            *map(native.view, (grad, x, out, weight, bias, mean, var)), ctx.eps, ctx.activation, native.view(sums), native.view(grad_x),
            native.view(grad_residual if ctx.activation else None), native.view(grad_weight), native.view(grad_bias), native.threads()
        )
        return grad_x, None, None, grad_weight, grad_bias, grad_residual, None, None, None


def _differentiable(ctx: Any, grad: Tensor) -> tuple:
    """The same derivative through torch, for create_graph=True: torch knows the second one."""
    x, out, weight, bias, _, _ = ctx.saved_tensors
    norm = F.batch_norm(x, None, None, weight, bias, True, 0.0, ctx.eps)
    if ctx.activation:
        out = norm.detach() if out is None else out
        inside = out > 0 if ctx.activation == 1 else (out > 0) & (out < 6)
        grad = torch.where(inside | out.isnan(), grad, 0)
    leaves = [x, weight] if weight is not None else [x]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = dict(zip(map(id, wanted), torch.autograd.grad(norm, wanted, grad, create_graph=True) if wanted else (), strict=True))
    grad_bias = grad.to(_wide(x)).sum((0, 2, 3)) if ctx.needs_input_grad[4] else None
    return found.get(id(x)), None, None, found.get(id(weight)), grad_bias, grad if ctx.needs_input_grad[5] else None, None, None, None


def _check_map(op: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be [N, C, H, W], got {list(x.shape)}.")


def _positions(x: Tensor) -> int:
    count, _, height, width = x.shape
    return count * height * width


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _row(row: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if row is None or (row.dtype == dtype and row.is_contiguous()):
        return row
    return row.to(dtype).contiguous()


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _sums(x: Tensor) -> Tensor:
    """Room for the sums of fixed shares of the rows; their number depends on shapes alone, and is even, for two threads that read whole rows."""
    rows = _positions(x)
    splits = 16 if rows >= 8192 else 8 if rows >= 4096 else 4 if rows >= 2048 else 2 if rows >= 128 else 1
    return torch.empty((splits, 2, x.shape[1]), dtype=torch.float64)


def _map_views(x: Tensor, *others: Tensor | None) -> list[tuple | None]:
    """`native.view` of maps of one shape and dtype in channels-last memory, which cost most of their time for shape and strides."""
    like = x.shape, x.stride(), native.code(x)
    return [(x.data_ptr(), *like), *(None if map is None else (map.data_ptr(), *like) for map in others)]


def _row_views(channels: int, *rows: Tensor | None) -> list[tuple | None]:
    """`native.view` of contiguous rows float32 [C]."""
    return [None if row is None else (row.data_ptr(), (channels,), (1,), native.FLOAT32) for row in rows]


def _shares(x: Tensor) -> Tensor:
    """The same for the CUDA kernels: at most four blocks for each multiprocessor of an H100, and at least 16384 values to each."""
    channels = x.shape[1]
    shares = max(1, min(528, x.numel() // 16384) // max(1, channels // 256))
    return torch.empty((shares, 2, channels), dtype=torch.float64, device=x.device)


def _reference_moments(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float) -> tuple[Tensor, Tensor]:
    wide = x.to(_wide(x))
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    if running_mean is not None and running_var is not None:
        count = x.shape[0] * x.shape[2] * x.shape[3]
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    return mean, var
