"""1x1 convolution of packed tiles: in the memory view and with the products that measurement found fastest."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .registry import eager
from .tile_conv import _sums, _workspace, rounds


class Own(NamedTuple):
    """Which of the three products of a 1x1 convolution the core takes; the others are torch's, that is oneDNN's."""

    forward: bool
    grad_input: bool
    grad_weight: bool


# Zen 4, 2 threads, oneDNN 3.x through torch 2.14. The rows lie in memory one after the other, so any factors of their number may stand for height
# and width. As one image of few long rows, t * t by T: many tiny images cost oneDNN up to three times as much (2048 -> 512 at t = 1: 30 against
# 87 GFLOP/s a thread), and many short rows up to a tenth (64 -> 256 at t = 8, both gradients of 160 tiles: 5.90 ms as tiles, 5.92 as T by t * t,
# 5.32 as t * t by T; 128 -> 512 at t = 4: 4.04, 4.02, 3.75; forward and in bfloat16 within 3 %).

# ms with torch / with the core, by rows (tiles times t * t), at t = 1:
#   float32 forward, 512 -> 2048: 96 rows 1.40 / 1.30, 160 2.39 / 1.97, 340 3.93 / 4.07, 640 9.0 / 7.0, 1360 13.8 / 16.6;
#     2048 -> 512: 1.56 / 1.12, 2.66 / 1.77, 4.11 / 3.77, 7.2 / 6.8, 14.2 / 16.7.
#   float32 backward, both gradients, 512 -> 2048: 3.67 / 2.54, 5.02 / 4.36, 8.80 / 8.70, 19.4 / 16.1, 33.0 / 37.5;
#     2048 -> 512: 4.57 / 2.84, 5.97 / 4.73, 9.47 / 7.90, 21.2 / 15.2, 43.0 / 36.5 (the weight's 24.7 / 19.9).
#   bfloat16, the weight's gradient, 512 -> 2048: 0.95 / 0.62, 1.53 / 1.24, 3.33 / 2.11, 4.6 / 4.4, 14.1 / 9.3; the rest torch.
#   bfloat16 under autocast, forward and backward with the casts of the weight, 2048 -> 512, torch / the core for the weight's gradient alone /
#     for all: 96 rows 5.5 / 3.9 / 2.9, 160 6.6 / 5.0 / 4.1, 340 9.7 / 7.8 / 7.2, 640 no difference; 512 -> 2048: the weight's gradient alone.
# At t = 2 filters are smaller. float32, both gradients, 1024 -> 256: 384 rows 2.62 / 2.16, 640 no difference in the net, 1360 torch by 7 %;
#   bfloat16, the weight's gradient, 256 -> 1024: 384 rows 0.79 / 0.62, 640 no difference in the net. At t = 4 and 8: torch, by 0-20 %.
ROWS_OF_CORE = {1: 1024, 2: 512}
ROWS_OF_NARROWING = 512
"""Rows up to which the core takes all products in bfloat16, too, at t = 1 and from many channels to few."""
_TORCH = Own(False, False, False)
_CAST = (torch.float32, torch.bfloat16, torch.float16)
"""What autocast turns into its own dtype."""
_NARROWEST = 64
"""Channels from which on the core's panels are full."""


def pointwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1x1 convolution of packed tiles; positions do not see each other, so no plan is needed.

    Args:
        x: Packed tiles, channels-last. [T, C, t, t]
        weight: Filters. [K, C, 1, 1]
        bias: Added at every position, or None. [K]

    Returns:
        Packed tiles. [T, K, t, t]

    As torch's conv2d in dtype, autocast and second derivatives. Deterministic.
    """
    tiles, channels, edge, _ = x.shape
    if x.device.type == "cuda":
        return _linear(x, weight, bias)
    if x.device.type != "cpu" or not x.is_contiguous(memory_format=torch.channels_last):
        return F.conv2d(x, weight, bias)
    autocast = torch.is_autocast_enabled("cpu")
    kind = torch.get_autocast_dtype("cpu") if autocast and x.dtype != torch.float64 else x.dtype
    rows = x.permute(0, 2, 3, 1).view(1, edge * edge, tiles, channels).permute(0, 3, 1, 2)
    own = _own(kind, tiles, edge, weight) if _fits(x, weight, bias, kind, autocast) else _TORCH
    if own == _TORCH:
        out = F.conv2d(rows, weight, bias)
    else:
        out = _Rows.apply(rows.to(kind), weight, None if bias is None else bias.to(kind), own)
    return out.permute(0, 2, 3, 1).reshape(tiles, edge, edge, weight.shape[0]).permute(0, 3, 1, 2)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As one matrix product on the packed rows: cuBLAS has no use for the shape of a map, and adds the bias in the same kernel."""
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None, kind: torch.dtype, autocast: bool) -> bool:
    """Whether the core may be given these; what does not fit together is for torch to refuse, and what watches the dispatcher must see it."""
    parameters = [weight] if bias is None else [weight, bias]
    return (
        not torch.compiler.is_compiling()
        and eager((x, weight, bias))
        and weight.shape[1] == x.shape[1]
        and all(p.is_cpu and p.shape[0] == weight.shape[0] and (p.dtype == kind or (autocast and p.dtype in _CAST)) for p in parameters)
    )


def _own(kind: torch.dtype, tiles: int, edge: int, weight: Tensor) -> Own:
    filters, channels = weight.shape[:2]
    if kind not in (torch.float32, torch.bfloat16) or min(filters, channels) < _NARROWEST:
        return _TORCH
    rows = tiles * edge * edge
    few = rows <= ROWS_OF_CORE.get(edge, 0)
    if (few and kind == torch.float32) or (edge == 1 and rows <= ROWS_OF_NARROWING and channels > filters):
        return Own(True, True, True)
    learns = weight.requires_grad and torch.is_grad_enabled()
    deep = edge == 1 and (kind == torch.bfloat16 or channels > filters)
    return Own(False, False, True) if learns and (few or deep) else _TORCH


class _Rows(torch.autograd.Function):
    """conv2d of [1, C, t * t, T], each product from where `Own` says. The weight in the dtype of rows or in another that autocast casts."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, own: Own) -> Tensor:
        # The core rounds float32 filters as it reads them.
        cast = weight if own.forward and own.grad_input and rounds(rows, weight) else weight.to(rows.dtype)
        ctx.save_for_backward(rows, weight, cast)
        ctx.own, ctx.biased = own, bias is not None
        return _product("tile_conv_forward", rows, cast, bias) if own.forward else F.conv2d(rows, cast, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        rows, weight, cast = ctx.saved_tensors
        own = ctx.own
        if torch.is_grad_enabled():
            # torch knows the second derivative, the core does not; it goes on to the weight that was given.
            own, cast = _TORCH, weight.to(rows.dtype)
        needs = ctx.needs_input_grad[:3]
        # The bias's gradient alone would cost torch the weight's, too.
        mask = [needs[0] and not own.grad_input, needs[1] and not own.grad_weight, needs[2] and not own.grad_weight]
        grad_rows, grad_weight, grad_bias = None, None, None
        if any(mask):
            sizes = [weight.shape[0]] if ctx.biased else None
            grad_rows, grad_weight, grad_bias = torch.ops.aten.convolution_backward(grad, rows, cast, sizes, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask)
        if needs[0] and own.grad_input:
            grad_rows = _product("tile_conv_grad_input", grad, cast)
        if needs[1] and own.grad_weight:
            grad_weight = _grad_weight(grad, rows, weight)
        if needs[2] and own.grad_weight:
            grad_bias = _grad_bias(grad)
        return grad_rows, grad_weight, grad_bias, None


@functools.lru_cache(maxsize=64)
def _plan_of_rows(count: int) -> tuple[Tensor, Tensor]:
    """Coordinates and slots of `count` images of one patch: each row is a tile of its own."""
    slots = torch.arange(count, dtype=torch.int32, device="cpu")
    return torch.stack((slots, torch.zeros_like(slots), torch.zeros_like(slots)), 1), slots.view(count, 1, 1)


def _as_tiles(rows: Tensor) -> Tensor:
    """[1, C, t * t, T] -> [T * t * t, C, 1, 1]"""
    return rows.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).reshape(-1, rows.shape[1], 1, 1)


_GEOMETRY = [1, 1, 1, 0, 0, 0, 0, 1]
"""ops/conv_geometry.py, of a window of one position."""


def _product(kernel: str, rows: Tensor, weight: Tensor, *bias: Tensor | None) -> Tensor:
    """rows times weight (forward) or its transpose (grad_input). [1, K or C, t * t, T]"""
    tiles, room = _as_tiles(rows), _workspace(weight, 1)
    width = weight.shape[0 if kernel == "tile_conv_forward" else 1]
    # Made in the shape that is returned: autograd lets nobody write to a view that was made inside a Function.
    out = torch.empty((1, width, *rows.shape[2:]), dtype=rows.dtype, memory_format=torch.channels_last)
    plan = _plan_of_rows(tiles.shape[0])  # a view does not keep its tensor alive, so each has a name until the kernel returns
    views = map(native.view, (tiles, weight, *bias, *plan))
    getattr(native.core(), kernel)(*views, _GEOMETRY, native.view(room), native.view(_as_tiles(out)), native.threads())
    return out


def _grad_weight(grad: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """sum over rows of grad[k] * x[c]; in float32 where the weight is that. [K, C, 1, 1]"""
    grad, x = _as_tiles(grad), _as_tiles(rows)
    out = torch.empty_like(weight, dtype=torch.float32 if weight.dtype == torch.float32 else rows.dtype, memory_format=torch.channels_last)
    sums, plan = _sums(grad, out.numel()), _plan_of_rows(grad.shape[0])
    views = map(native.view, (grad, x, *plan))
    native.core().tile_conv_grad_weight(*views, _GEOMETRY, native.view(sums), native.view(out), native.threads())
    return out


def _grad_bias(grad: Tensor) -> Tensor:
    """sum over rows of grad[k]. [K]"""
    grad = _as_tiles(grad)
    out, sums = grad.new_empty(grad.shape[1]), _sums(grad, grad.shape[1])
    native.core().tile_conv_grad_bias(native.view(grad), native.view(sums), native.view(out), native.threads())
    return out
