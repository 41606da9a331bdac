"""The decoder's doubling convolution, 4x4 with stride 2, on the CPU: torch's product, our derivatives where those are faster."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .conv3x3 import _last, _places
from .registry import once_only, register
from .tile_conv import _autocast, _channels_last, _grad_bias, _sums, _workspace, rounds

_KINDS = (torch.float32, torch.bfloat16, torch.float16)
_GEOMETRY = [2, 1, 1, 1, 1, 1, 1, 1]  # stride 2, padding 1 of the convolution that this transposes: ops/conv_geometry.py
# Edges of x up to which the kernels of tile_conv beat torch's, measured with 768 and 384 channels (bench/NOTES.md, Winograd): the
# derivative in the filters 2.0 and 3.6 times (float32, bfloat16) at 7 and 1.1 to 1.2 times at 14, that in x 1.6 and 1.1 times at 7.
_WEIGHT_EDGE, _INPUT_EDGE = 14, 7


def conv_transpose4x4(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """conv_transpose2d with a 4x4 kernel, stride 2, padding 1: twice the resolution.

    Args:
        x: Dense maps. float32 | bfloat16 | float16 [B, C, H, W]
        weight: Filters, same dtype. [C, K, 4, 4]
        bias: Same dtype, or None. [K]

    Returns:
        Same dtype. [B, K, 2H, 2W]

    Raises:
        ValueError: weight is not [C, K, 4, 4] for the channels of x.

    On the CPU the derivative in the bias is ours, which torch computes at a tenth of the memory's pace in bfloat16, and those in filters and x on small maps.
    Differentiable once. Our derivatives do not depend on the number of threads, torch's may in the last bits. Under autocast the tensors are cast to its dtype; the derivative in a
    float32 weight is float32 then, and not rounded on its way where it is ours.
    """
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[0] != x.shape[1] or list(weight.shape[2:]) != [4, 4]:
        raise ValueError(f"conv_transpose4x4: weight must be [C, K, 4, 4] for x [B, C, H, W], got {list(weight.shape)} for {list(x.shape)}.")
    x, weight, bias = _autocast(x, weight, bias)
    kept = torch.is_autocast_enabled(x.device.type) and rounds(x, weight)
    same = (kept or weight.dtype == x.dtype) and (bias is None or bias.dtype == x.dtype)
    if x.device.type == "cpu" and same and x.dtype in _KINDS and x.numel() and weight.shape[1]:
        return _conv_transpose(x, weight, bias)
    return F.conv_transpose2d(x, weight, bias, 2, 1)  # which sees autocast itself


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    shape = (x.shape[0], weight.shape[1], 2 * x.shape[2], 2 * x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _implementation(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _last(F.conv_transpose2d(_last(x), weight.to(x.dtype), bias, 2, 1))


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        _grad_input(grad, weight) if needs[0] else None,
        _grad_weight(grad, x, list(weight.shape), rounds(x, weight)) if needs[1] else None,
        _grad_bias(grad, "") if needs[2] else None,
    )


def _torch_backward(grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool]) -> Tensor:
    found = torch.ops.aten.convolution_backward(grad, x, weight, None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1, mask)
    return _last(found[mask.index(True)])


def _input_fake(grad: Tensor, weight: Tensor) -> Tensor:
    shape = (grad.shape[0], weight.shape[0], grad.shape[2] // 2, grad.shape[3] // 2)
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)


def _input_implementation(grad: Tensor, weight: Tensor) -> Tensor:
    out = _input_fake(grad, weight)
    height, width = out.shape[2:]
    if height != width or height > _INPUT_EDGE or weight.shape[:2] == (1, 1):
        return _torch_backward(_last(grad), out, weight.to(grad.dtype), [True, False, False])
    grad, workspace = _channels_last(grad), _workspace(weight, 1)
    coords, slots = _places(len(grad))
    native.core().tile_conv_forward(native.view(grad), native.view(weight), None, native.view(coords), native.view(slots), _GEOMETRY,
                                    native.view(workspace), native.view(out), native.threads())
    return out


def _weight_fake(grad: Tensor, x: Tensor, shape: list[int], wide: bool = False) -> Tensor:
    return torch.empty(shape, dtype=torch.float32 if wide else x.dtype, device=x.device, memory_format=torch.channels_last)


def _weight_implementation(grad: Tensor, x: Tensor, shape: list[int], wide: bool = False) -> Tensor:
    height, width = x.shape[2:]
    if height != width or height > _WEIGHT_EDGE:
        found = _torch_backward(_last(grad), _last(x), _weight_fake(grad, x, shape, False), [False, True, False])
        return found.to(torch.float32) if wide else found
    out = _weight_fake(grad, x, shape, wide)
    grad, x, sums = _channels_last(grad), _channels_last(x), _sums(x, out.numel())
    coords, slots = _places(len(x))
    native.core().tile_conv_grad_weight(native.view(x), native.view(grad), native.view(coords), native.view(slots), _GEOMETRY, native.view(sums),
                                        native.view(out), native.threads())
    return out


_conv_transpose = register("conv_transpose4x4", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _implementation, _fake, setup_context=_setup,
                           backward=_backward)
_grad_input = register("conv_transpose4x4_grad_input", "(Tensor grad, Tensor weight) -> Tensor", _input_implementation, _input_fake,
                       setup_context=lambda ctx, inputs, output: None, backward=once_only("conv_transpose4x4"))
_grad_weight = register("conv_transpose4x4_grad_weight", "(Tensor grad, Tensor x, SymInt[] shape, bool wide=False) -> Tensor", _weight_implementation, _weight_fake,
                        setup_context=lambda ctx, inputs, output: None, backward=once_only("conv_transpose4x4"))
