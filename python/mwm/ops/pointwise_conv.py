"""1x1 convolution of packed tiles: torch's products, in the memory view and with the kernel that measurement found fastest."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native

# Zen 4, 2 threads, 160 tiles, oneDNN 3.x through torch 2.14; GFLOP/s of oneDNN and of the core's implicit GEMM.
#   view: many tiny images cost oneDNN up to three times as much as the rows of one image (2048 -> 512 at t = 1: 30 against 87 a thread);
#         at t = 8 in float32 the tiles as they are win by 5 %.
#   weight gradient at t = 1: float32 2048 -> 512: 91 / 132, 3072 -> 768: 87 / 138, 512 -> 2048: 149 / 130;
#         bfloat16 2048 -> 512: 124 / 311, 512 -> 2048: 247 / 301, 3072 -> 768: 212 / 265, 768 -> 3072: 225 / 279.
#   forward, input gradient, and everything at larger tiles: oneDNN, by 0-10 %.
ROWS_UP_TO = {torch.float32: 4, torch.float64: 4, torch.float16: 4, torch.bfloat16: 1 << 30}


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
    if edge > ROWS_UP_TO.get(kind, 4):
        return F.conv2d(x, weight, bias)
    rows = x.permute(0, 2, 3, 1).view(1, tiles, edge * edge, channels).permute(0, 3, 1, 2)
    if edge == 1 and bias is None and _own_weight_gradient(kind, channels, weight) and not torch.compiler.is_compiling():
        out = _Rows.apply(rows.to(kind), weight.to(kind))
    else:
        out = F.conv2d(rows, weight, bias)
    return out.permute(0, 2, 3, 1).reshape(tiles, edge, edge, weight.shape[0]).permute(0, 3, 1, 2)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As one matrix product on the packed rows: cuBLAS has no use for the shape of a map, and adds the bias in the same kernel."""
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def _own_weight_gradient(kind: torch.dtype, channels: int, weight: Tensor) -> bool:
    if type(weight.data) is not Tensor or not weight.requires_grad or not torch.is_grad_enabled():
        return False
    return (kind == torch.bfloat16 or (kind == torch.float32 and channels > weight.shape[0])) and min(channels, weight.shape[0]) >= 64


class _Rows(torch.autograd.Function):
    """conv2d of [1, C, T, 1] with the weight's gradient from the core."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return F.conv2d(rows, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        rows, weight = ctx.saved_tensors
        own = not torch.is_grad_enabled()  # torch knows the second derivative, the core does not
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1] and not own, False]
        grad_rows, grad_weight = None, None
        if any(mask):
            grad_rows, grad_weight, _ = torch.ops.aten.convolution_backward(grad, rows, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask)
        if own and ctx.needs_input_grad[1]:
            grad_weight = _grad_weight(grad, rows, weight)
        return grad_rows, grad_weight


def _grad_weight(grad: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """sum over rows of grad[k] * x[c], each row taken for a tile of its own. [K, C, 1, 1]"""
    from .tile_conv import _sums

    count = rows.shape[2]
    x, grad = (t.contiguous(memory_format=torch.channels_last).permute(2, 1, 0, 3) for t in (rows, grad))
    slots = torch.arange(count, dtype=torch.int32)
    coords = torch.zeros((count, 3), dtype=torch.int32)
    coords[:, 0] = slots
    out = torch.empty_like(weight, memory_format=torch.channels_last)
    sums = _sums(grad, out.numel())
    native.core().tile_conv_grad_weight(
        *map(native.view, (grad, x, coords, slots.view(count, 1, 1))), [1, 1, 1, 0, 0, 0, 0, 1], native.view(sums), native.view(out), native.threads()
    )
    return out
