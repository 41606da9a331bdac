"""Norms that see positions of an image or a batch: the visible ones only."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mwm.ops import TilePlan, batch_moments, has_kernel, image_sum

from .operands import image_rows, map_of, settled
from .packed import Packed
from .pending import PendingNorm
from .reductions import image_count, mean_rows
from .registry import handles
from .windows import _bind


@handles(F.batch_norm)
def batch_norm(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """Over the visible positions of the batch. With one value the variance is 0 and the running variance stays; with none, both stay.

    num_batches_tracked counts every call in train mode, as torch counts them, also one without a visible patch.
    """
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    x, mean, var, weight, bias, training, momentum, eps = _bind(names, args, kwargs, {"training": False, "momentum": 0.1, "eps": 1e-5})
    x = map_of(function, settled(function, x))
    if training and _has_own_kernel(x._data, mean, var, weight, bias):
        moments = batch_moments(x._data, mean, var, momentum=momentum)
        pending = PendingNorm.of(x._data, *moments, weight, bias, eps)
        # Without a graph torch allows to write to x afterwards, so the result is made at once.
        return x._wait(pending) if torch.is_grad_enabled() else x._like(pending.result())
    return x._like(batch_norm_tiles(x._data, mean, var, weight, bias, training, momentum, eps))


def _has_own_kernel(x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the norm may wait for what follows it: in training, eagerly, where it has a kernel; inductor fuses torch's own norm."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or not has_kernel("batch_norm", x):
        return False
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.is_floating_point()
        and x.shape[0] * x.shape[2] * x.shape[3] >= 2
        and x.is_contiguous(memory_format=torch.channels_last)
        and (mean is None) == (var is None)
        and all(row is None or row.dtype in (wide, x.dtype) for row in (weight, bias, mean, var))
    )


def batch_norm_tiles(x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, training: bool,
                     momentum: float, eps: float) -> Tensor:
    """batch_norm of packed tiles. [T, C, t, t]"""
    few = training and x.shape[0] * x.shape[2] * x.shape[3] < 2
    if not few:
        return torch.batch_norm(x, weight, bias, mean, var, training, momentum, eps, torch.backends.cudnn.enabled)
    centre = x.detach().sum((0, 2, 3))  # the value itself, or 0 where there is none
    if x.shape[0] and mean is not None:
        mean.lerp_(centre.to(mean.dtype), momentum)
    out = (x - x.mean((0, 2, 3), keepdim=True)) * (eps ** -0.5) if x.shape[0] else x
    out = out if weight is None else out * weight[:, None, None].to(x.dtype)
    return out if bias is None else out + bias[:, None, None].to(x.dtype)


@handles(F.group_norm, torch.group_norm)
def group_norm(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """Per image, over its visible positions and the channels of a group."""
    x, groups, weight, bias, eps = _bind(("input", "num_groups", "weight", "bias", "eps"), args, kwargs, {"eps": 1e-5})
    x = map_of(function, settled(function, x))
    if x._data.shape[1] % groups:
        raise ValueError(f"Expected number of channels in input to be divisible by num_groups, but got {x._data.shape[1]} and {groups}")
    return x._like(_normalised(x._data, x._plan, groups, weight, bias, eps))


def _normalised(x: Tensor, plan: TilePlan, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    channels = x.shape[1]
    per_group = channels // groups

    def of_group(rows: Tensor) -> Tensor:
        grouped = rows.reshape(-1, groups, per_group).mean(2, keepdim=True)
        return grouped.expand(-1, groups, per_group).reshape(-1, channels)

    mean = of_group(mean_rows(wide, plan))
    centred = wide - image_rows(mean, plan)[:, :, None, None]
    var = of_group(mean_rows(centred.square(), plan))
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    out = centred * image_rows(scale, plan)[:, :, None, None]
    if bias is not None:
        out = out + bias.to(out.dtype)[:, None, None]
    return out.to(x.dtype)


@handles(F.instance_norm)
def instance_norm(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """Per image and channel, over its visible positions; running statistics average the images that have enough of them."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    x, mean, var, weight, bias, from_input, momentum, eps = _bind(names, args, kwargs, {"use_input_stats": True, "momentum": 0.1, "eps": 1e-5})
    x = map_of(function, settled(function, x))
    tiles, plan = x._data, x._plan
    if not from_input:
        return x._like(torch.batch_norm(tiles, weight, bias, mean, var, False, momentum, eps, torch.backends.cudnn.enabled))
    if mean is not None:
        _update(tiles.detach(), plan, mean, var, momentum)
    return x._like(_normalised(tiles, plan, tiles.shape[1], weight, bias, eps))


def _update(tiles: Tensor, plan: TilePlan, mean: Tensor, var: Tensor, momentum: float) -> None:
    """Running statistics of instance norm: the mean over images of their means and unbiased variances."""
    wide = tiles if tiles.dtype == torch.float64 else tiles.float()
    count = image_count(plan, tiles.shape[-1])
    centre = mean_rows(wide, plan)
    squares = image_sum((wide - image_rows(centre, plan)[:, :, None, None]).square(), plan)
    some = (plan.offsets.diff() > 0)[:, None]
    several = some & (count > 1)
    for running, rows, valid in ((mean, centre, some), (var, squares / (count - 1).clamp(min=1), several)):
        images = valid.sum()
        value = torch.where(valid, rows, 0.0).sum(0) / images.clamp(min=1)
        running.lerp_(torch.where(images > 0, value.to(running.dtype), running), momentum)
