"""Batch norm whose statistics are those of the joint batch of all ranks; torch's own raises on CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mwm.sparse import Packed

_CLASSES: dict[type, type] = {}


def synchronised(layer: nn.Module) -> nn.Module:
    """Make a batch norm layer take its training statistics over all ranks of the default process group, in place.

    The layer's class becomes a subclass of itself that runs its own forward and replaces the one call of F.batch_norm in
    it; so layers with an activation inside (timm) and layers on packed tiles work too, and keys and buffers do not change.
    """
    kind = type(layer)
    if kind not in _CLASSES and not issubclass(kind, _Synchronised):
        _CLASSES[kind] = type(f"Synchronised{kind.__name__}", (_Synchronised, kind), {"__module__": __name__, "plain": kind})
    layer.__class__ = _CLASSES.get(kind, kind)
    return layer


class _Synchronised(nn.Module):
    """First in the resolution order, before the layer's own class."""

    plain: type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _OverRanks():
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made on the fly and cannot be found by name; a copy is made by making the class again.
        return _rebuild, (self.plain, self.__dict__)


def _rebuild(kind: type, state: dict) -> nn.Module:
    layer = kind.__new__(kind)
    layer.__dict__ = state
    return synchronised(layer)


class _OverRanks(TorchFunctionMode):
    """While active, F.batch_norm in training mode means the joint batch."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """F.batch_norm over all ranks, on a plain tensor or on packed tiles."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    packed = isinstance(input, Packed)
    x = input.tiles if packed else input
    mean, variance, count = joint_moments(x)
    if running_mean is not None and running_var is not None:
        _update_running(running_mean, running_var, mean, variance, count, momentum)
    out = _Normalise.apply(x, weight, bias, mean, torch.rsqrt(variance + eps), count)
    return Packed(out, input.plan) if packed else out


def joint_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and population variance of each channel over the positions of all ranks, and their number.

    Each rank's moments are gathered and merged in the order of the ranks (Chan, Golub, LeVeque: Updating formulae and a pairwise
    algorithm for computing sample variances, 1979), in float64.

    Args:
        x: this rank's values; may hold no position at all. [N, C, ...]

    Returns:
        Mean [C], variance [C], count []; float64, zero where no rank has a position.
    """
    channels = x.shape[1]
    local = torch.zeros(2 * channels + 1, dtype=torch.float64, device=x.device)
    positions = x.numel() // channels
    if positions:
        wide = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        variance, mean = torch.var_mean(wide, _others(x), correction=0)
        local[:channels], local[channels : 2 * channels], local[-1] = mean, variance.double() * positions, positions
    ranks = _gather(local)
    counts, means, squares = ranks[:, -1:], ranks[:, :channels], ranks[:, channels : 2 * channels]
    count = _in_order(counts)[0]
    mean = _in_order(counts * means) / count.clamp(min=1)
    squares = _in_order(squares + counts * (means - mean).square())
    return mean, squares / count.clamp(min=1), count


@torch.no_grad()
def _update_running(running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor, count: Tensor, momentum: float) -> None:
    """As the dense layer does; no position changes nothing, a single one leaves the variance alone."""
    unbiased = variance * count / (count - 1).clamp(min=1)
    running_mean.copy_(torch.where(count > 0, torch.lerp(running_mean.double(), mean, momentum), running_mean.double()))
    running_var.copy_(torch.where(count > 1, torch.lerp(running_var.double(), unbiased, momentum), running_var.double()))


class _Normalise(torch.autograd.Function):
    """(x - mean) * scale * weight + bias, where mean and scale depend on the values of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, scale: Tensor, count: Tensor) -> Tensor:
        kind = torch.promote_types(torch.float32, x.dtype)
        ctx.save_for_backward(x, weight, mean.to(kind), scale.to(kind), count)
        ctx.has_bias = bias is not None
        out = (x.to(kind) - _along(mean.to(kind), x)) * _along(scale.to(kind), x)
        if weight is not None:
            out = out * _along(weight.to(kind), x)
        if bias is not None:
            out = out + _along(bias.to(kind), x)
        return out.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, weight, mean, scale, count = ctx.saved_tensors
        kind = mean.dtype
        grad = grad.to(kind)
        normal = (x.to(kind) - _along(mean, x)) * _along(scale, x)
        sums = torch.stack([grad.sum(_others(x)), (grad * normal).sum(_others(x))]).double()
        grad_weight = sums[1].to(weight.dtype) if weight is not None else None
        grad_bias = sums[0].to(mean.dtype if weight is None else weight.dtype) if ctx.has_bias else None
        joint = (_in_order(_gather(sums)) / count.clamp(min=1)).to(kind)
        inner = grad - _along(joint[0], x) - normal * _along(joint[1], x)
        factor = scale if weight is None else scale * weight.to(kind)
        return (inner * _along(factor, x)).to(x.dtype), grad_weight, grad_bias, None, None, None


def _gather(local: Tensor) -> Tensor:
    """One row per rank."""
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.stack(parts)


def _in_order(ranks: Tensor) -> Tensor:
    """Sum over the first axis, one rank after the other."""
    total = ranks[0].clone()
    for row in ranks[1:]:
        total += row
    return total


def _others(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _along(values: Tensor, x: Tensor) -> Tensor:
    """[C] so that it broadcasts along the channels of x."""
    return values.view(-1, *[1] * (x.dim() - 2))
