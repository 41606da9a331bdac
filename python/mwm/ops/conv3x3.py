"""3x3 convolution of dense maps on the CPU: minimal filtering where it pays, torch elsewhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import winograd
from .registry import once_only, register
from .tile_conv import _autocast, _grad_bias, rounds

_KINDS = (torch.float32, torch.bfloat16, torch.float16)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """conv2d with a 3x3 kernel, stride 1, padding 1.

    The op of this package on the CPU where `winograd.square_edge` says that it is faster, conv2d everywhere else; values agree to rounding (the error
    is below twice that of conv2d).

    Args:
        x: Dense maps. float32 | bfloat16 | float16 [B, C, H, W]
        weight: Filters, same dtype. [K, C, 3, 3]
        bias: Same dtype, or None. [K]

    Returns:
        Same dtype, channels-last memory where the op ran. [B, K, H, W]

    Raises:
        ValueError: weight is not [K, C, 3, 3] for the channels of x.

    Differentiable once. Where the op runs, bits do not depend on the number of threads. Under autocast the tensors are cast to its dtype, as for conv2d;
    the derivative in a float32 weight is then float32 all the way where the op ran.
    Source: arXiv 1509.09308, section 4.
    """
    if x.dim() != 4 or weight.dim() != 4 or list(weight.shape[1:]) != [x.shape[1], 3, 3]:
        raise ValueError(f"conv3x3: weight must be [K, C, 3, 3] for x [B, C, H, W], got {list(weight.shape)} for {list(x.shape)}.")
    x, weight, bias = _autocast(x, weight, bias)
    kept = torch.is_autocast_enabled(x.device.type) and rounds(x, weight)
    same = (kept or weight.dtype == x.dtype) and (bias is None or bias.dtype == x.dtype)
    # With a bias also where torch convolves: its derivative in the bias is slow in bfloat16.
    if x.device.type == "cpu" and same and x.dtype in _KINDS and x.numel() and (bias is not None or winograd.square_edge(x, weight.shape, winograd.PLAIN)):
        return _conv3x3(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=1)  # which sees autocast itself


def _places(batch: int) -> tuple[Tensor, Tensor]:
    """Every image as one tile without neighbours: coords [B, 3] and slots [B, 1, 1]."""
    slots = torch.arange(batch, dtype=torch.int32)
    coords = torch.zeros((batch, 3), dtype=torch.int32)
    coords[:, 0] = slots
    return coords, slots.view(batch, 1, 1)


def _new(like: Tensor, channels: int) -> Tensor:
    shape = (like.shape[0], channels, like.shape[2], like.shape[3])
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _new(x, weight.shape[0])


def _implementation(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    edge = winograd.square_edge(x, weight.shape, winograd.PLAIN)
    if not edge:
        return _last(F.conv2d(x, weight.to(x.dtype), bias, padding=1))
    return winograd.convolve(_last(x), weight, None if bias is None else bias.contiguous(), *_places(len(x)), edge)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    return (
        _grad_input(grad, weight) if needs[0] else None,
        _grad_weight(grad, x, rounds(x, weight)) if needs[1] else None,
        _grad_bias(grad, "") if needs[2] else None,
    )


def _input_fake(grad: Tensor, weight: Tensor) -> Tensor:
    return _new(grad, weight.shape[1])


def _input_implementation(grad: Tensor, weight: Tensor) -> Tensor:
    edge = winograd.square_edge(grad, weight.shape, winograd.PLAIN)
    if not edge:
        return _last(torch.nn.grad.conv2d_input((len(grad), weight.shape[1], *grad.shape[2:]), weight.to(grad.dtype), grad, padding=1))
    return winograd.convolve(_last(grad), weight, None, *_places(len(grad)), edge, adjoint=True)


def _weight_fake(grad: Tensor, x: Tensor, wide: bool = False) -> Tensor:
    shape = (grad.shape[1], x.shape[1], 3, 3)
    return torch.empty(shape, dtype=torch.float32 if wide else x.dtype, device=x.device, memory_format=torch.channels_last)


def _weight_implementation(grad: Tensor, x: Tensor, wide: bool = False) -> Tensor:
    shape = (grad.shape[1], x.shape[1], 3, 3)
    edge = winograd.square_edge(grad, shape, winograd.PLAIN, weight_gradient=True)
    if not edge:
        found = _last(torch.nn.grad.conv2d_weight(x, shape, grad, padding=1))
        return found.to(torch.float32) if wide else found
    return winograd.grad_weight(_last(grad), _last(x), *_places(len(x)), edge, _weight_fake(grad, x, wide))


_conv3x3 = register("conv3x3", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _implementation, _fake, setup_context=_setup, backward=_backward)
_grad_input = register("conv3x3_grad_input", "(Tensor grad, Tensor weight) -> Tensor", _input_implementation, _input_fake,
                       setup_context=lambda ctx, inputs, output: None, backward=once_only("conv3x3"))
_grad_weight = register("conv3x3_grad_weight", "(Tensor grad, Tensor x, bool wide=False) -> Tensor", _weight_implementation, _weight_fake,
                        setup_context=lambda ctx, inputs, output: None, backward=once_only("conv3x3"))
