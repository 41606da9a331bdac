"""The meaning of a sparse net, written apart from it: the dense net under a mode that masks what looks sideways.

Every function that looks sideways gets its map multiplied by the mask first; norms gather the visible positions, normalise
the list and scatter it back; reductions over H and W count visible positions only. Nothing of `mwm` is used.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

SIDEWAYS = {F.conv2d, F.conv_transpose2d, F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.pad, F.interpolate, F.pixel_unshuffle}


class MaskMultiply(TorchFunctionMode):
    """Run dense code with the mask `active` bool [B, Gh, Gw]; grids are at least 2 x 2, so that a pooled map is no map."""

    def __init__(self, active: Tensor) -> None:
        super().__init__()
        self.active = active

    def mask(self, height: int, width: int) -> Tensor | None:
        """bool [B, height, width] if that is the size of a map."""
        _, rows, columns = self.active.shape
        edge = height // rows
        if edge == 0 or edge * rows != height or edge * columns != width:
            return None
        return self.active.repeat_interleave(edge, 1).repeat_interleave(edge, 2)

    def is_map(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.dim() == 4 and x.shape[0] == self.active.shape[0] and self.mask(*x.shape[2:]) is not None

    def is_row_of_maps(self, x: Tensor) -> bool:
        images = self.active.shape[0]
        return x.dim() == 4 and x.shape[0] == 1 < images and x.shape[1] % images == 0 and self.mask(*x.shape[2:]) is not None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        x = args[0] if args else kwargs.get("input")
        name = getattr(func, "__name__", "")
        if func in SIDEWAYS and self.is_map(x):
            return func(x * self.mask(*x.shape[2:])[:, None], *args[1:], **kwargs)
        if func in (F.conv2d, F.pad) and self.is_row_of_maps(x):  # CondConv2d: all images as groups of channels of one
            mask = self.mask(*x.shape[2:]).repeat_interleave(x.shape[1] // self.active.shape[0], 0)
            return func(x * mask[None], *args[1:], **kwargs)
        if func in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d) and self.is_map(x):
            return self.adaptive(func, x, args[1] if len(args) > 1 else kwargs["output_size"])
        if func is F.batch_norm and self.is_map(x):
            return self.batch_norm(x, *args[1:], **kwargs)
        if func in (F.group_norm, F.instance_norm) and self.is_map(x):
            return self.per_image_norm(func, x, *args[1:], **kwargs)
        if name in ("mean", "sum", "amax", "amin", "norm", "var", "std", "var_mean", "std_mean") and isinstance(x, Tensor):
            return self.reduce(func, name, args, kwargs)
        return func(*args, **kwargs)

    def adaptive(self, func, x: Tensor, size: Any) -> Tensor:
        mask = self.mask(*x.shape[2:])[:, None]
        if size not in (1, (1, 1), [1, 1]):
            return func(x * mask, size)
        if func is F.adaptive_avg_pool2d:
            return (x * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp(min=1)
        found = x.masked_fill(~mask, -torch.inf).amax((2, 3), keepdim=True)
        return found.masked_fill(~mask.any(3, True).any(2, True), 0.0)

    def batch_norm(self, x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        mask = self.mask(*x.shape[2:])
        rows = F.batch_norm(x.permute(0, 2, 3, 1)[mask], mean, var, weight, bias, training, momentum, eps)
        out = torch.zeros_like(x)
        out.permute(0, 2, 3, 1)[mask] = rows
        return out

    def per_image_norm(self, func, x, *args, **kwargs):
        out = torch.zeros_like(x)
        for image, mask in enumerate(self.mask(*x.shape[2:])):
            if mask.any():
                rows = x[image].permute(1, 2, 0)[mask].t()[None]  # [1, C, n]
                out[image].permute(1, 2, 0)[mask] = func(rows, *args, **kwargs)[0].t()
        return out

    def reduce(self, func, name, args, kwargs):
        x, rest = args[0], list(args[1:])
        dims = kwargs.get("dim", kwargs.get("axis"))
        if dims is None and rest and name != "norm":
            dims = rest[0]
        dims = [dims] if isinstance(dims, int) else list(dims or [])
        dims = sorted(d % x.dim() for d in dims)
        if len(dims) < 2 or dims[-1] != dims[-2] + 1 or x.shape[0] != self.active.shape[0]:
            return func(*args, **kwargs)
        mask = self.mask(x.shape[dims[-2]], x.shape[dims[-1]])
        if mask is None:
            return func(*args, **kwargs)
        mask = mask.reshape(mask.shape[0], *[1] * (dims[-2] - 1), *mask.shape[1:], *[1] * (x.dim() - dims[-1] - 1))
        mask = mask.expand(mask.shape[0], *[x.shape[d] if d in dims else mask.shape[d] for d in range(1, x.dim())])
        count = mask.sum(dims, keepdim=True).clamp(min=1).double()
        keepdim = kwargs.get("keepdim", rest[1] if len(rest) > 1 and name in ("mean", "sum", "amax", "amin") else False)
        if name in ("mean", "sum", "norm"):
            out = func(x * mask, *rest, **kwargs)
            size = math.prod(x.shape[d] for d in dims)
            return out * (size / (count if keepdim else count.squeeze(dims))) if name == "mean" else out
        if name in ("amax", "amin"):
            sign = 1 if name == "amax" else -1
            out = func(x.masked_fill(~mask, -sign * torch.inf), *rest, **kwargs)
            return out.masked_fill(out.isinf(), 0.0)
        correction = kwargs.get("correction", int(kwargs.get("unbiased", True)))
        mean = (x * mask).sum(dims, keepdim=True) / count
        var = ((x - mean) * mask).square().sum(dims, keepdim=True) / (count - correction).clamp(min=1)
        var = var.sqrt() if name.startswith("std") else var
        var, mean = (var, mean) if keepdim else (var.squeeze(dims), mean.squeeze(dims))
        return (var, mean) if name.endswith("mean") else var
