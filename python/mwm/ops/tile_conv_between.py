"""Convolution from the tiles of one plan to those of another, and its transpose: what is computed here from what lies there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gpu, native
from .backend import FLOATS, GPU_FLOATS, declare, resolve
from .conv_geometry import conv_numbers
from .pack_tiles import check_tiles, pack_tiles, unpack_tiles
from .plan import TilePlan
from .registry import once_only, register
from .tile_conv import _cast, _channels_last, _grad_bias, _sums, _workspace
from .tile_conv_gpu import tf32

declare("tile_conv_between", cpu=FLOATS, triton=GPU_FLOATS, reference=FLOATS)


def tile_conv_between(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source: TilePlan,
    target: TilePlan,
    *,
    stride: int = 1,
    padding: int | Sequence[int] = 0,
    transposed: bool = False,
    backend: str | None = None,
) -> Tensor:
    """conv2d or conv_transpose2d of the map that is zero outside of the source's tiles, at the target's tiles only.

    Args:
        x: Tiles of the source. float32 | bfloat16 | float16 | float64 [S, C, t, t]
        weight: Filters, same dtype, as torch has them. [K, C, kh, kw]; transposed [C, K, kh, kw]
        bias: Added at every position of the target, same dtype, or None. [K]
        source: Where the S tiles of x lie.
        target: Where the T tiles of the result lie; any patches of the same grid and images.
        stride: Step between windows, a divisor of t; transposed: the factor by which the map grows.
        padding: One number, (rows, columns), or (left, right, top, bottom); transposed: as in conv_transpose2d, what is cut off.
        transposed: conv_transpose2d instead of conv2d.
        backend: "cpu", "triton" or "reference" (the dense map through torch); None picks the best.

    Returns:
        Tiles of the target, same dtype, channels-last memory. [T, K, t // stride, t // stride]; transposed [T, K, t * stride, t * stride]

    Raises:
        TypeError: The dtypes of x, weight and bias differ.
        ValueError: Shapes or plans do not fit, or the dense output would not be the input divided (multiplied) by the stride.
        BackendError: `backend` cannot run this input; the message lists the reasons.

    Differentiable once in x, weight and bias. Deterministic, whatever the number of threads. Accumulates in float32 (float64 for
    float64). Under autocast the three tensors are cast to its dtype, as for conv2d.
    """
    check_tiles("tile_conv_between", x, source)
    if source.grid != target.grid or source.batch_size != target.batch_size or source.device != target.device:
        raise ValueError(f"tile_conv_between: target must be a plan of the source's images and grid ({source.batch_size} of {source.grid} on "
                         f"{source.device}), got {target.batch_size} of {target.grid} on {target.device}.")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = _cast(x, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)
    filters = weight.shape[1] if transposed else weight.shape[0]
    if weight.dim() != 4 or weight.shape[0 if transposed else 1] != x.shape[1]:
        raise ValueError(f"tile_conv_between: weight must be {'[C, K' if transposed else '[K, C'}, kh, kw] with C = {x.shape[1]} (the channels of x), "
                         f"got {list(weight.shape)}.")
    if bias is not None and list(bias.shape) != [filters]:
        raise ValueError(f"tile_conv_between: bias must be [K] with K = {filters} (the filters), got {list(bias.shape)}.")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"tile_conv_between: {name} must have the dtype of x ({x.dtype}), got {tensor.dtype}. Cast one of them.")
    small, large = (x.shape[2], x.shape[2] * stride) if transposed else (x.shape[2] // stride, x.shape[2])
    numbers = conv_numbers(large, source.grid, (weight.shape[2], weight.shape[3]), stride, padding, 1, 1)
    # One channel to one channel is a depthwise convolution to the kernels, which know one plan only.
    if resolve("tile_conv_between", backend, x) == "reference" or tuple(weight.shape[:2]) == (1, 1):
        return _reference(x, weight, bias, source, target, numbers, transposed)
    places, edge = (source.coords, source.slots, target.coords, target.slots), large if transposed else small
    return _between(x, weight, bias, *places, numbers, edge, transposed, backend or "")


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, source: TilePlan, target: TilePlan, numbers: list[int], transposed: bool) -> Tensor:
    stride, left, right, top, bottom = numbers[0], *numbers[3:7]
    dense = unpack_tiles(x, source)
    if not transposed:
        return pack_tiles(F.conv2d(F.pad(dense, (left, right, top, bottom)), weight, bias, stride), target)
    whole = F.conv_transpose2d(dense, weight, bias, stride)
    height, width = dense.shape[2] * stride, dense.shape[3] * stride
    return pack_tiles(whole[:, :, top : top + height, left : left + width], target)


def _new(x: Tensor, weight: Tensor, coords: Tensor, edge: int, transposed: bool) -> Tensor:
    shape = (coords.shape[0], weight.shape[1 if transposed else 0], edge, edge)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, source_coords: Tensor, source_slots: Tensor, target_coords: Tensor,
          target_slots: Tensor, geometry: list[int], edge: int, transposed: bool, backend: str = "") -> Tensor:
    return _new(x, weight, target_coords, edge, transposed)


def _implementation(x: Tensor, weight: Tensor, bias: Tensor | None, source_coords: Tensor, source_slots: Tensor, target_coords: Tensor,
                    target_slots: Tensor, geometry: list[int], edge: int, transposed: bool, backend: str = "") -> Tensor:
    out = _new(x, weight, target_coords, edge, transposed)
    x, bias = _channels_last(x), None if bias is None else bias.contiguous()
    if resolve("tile_conv_between", backend, x) == "triton":
        kernels = gpu.triton_kernels("tile_conv")
        with gpu.guard(x):
            run = kernels.grad_input if transposed else kernels.forward
            run(x, _channels_last(weight), bias, target_coords, source_slots, geometry, out, tf32=tf32(x))
        return out
    workspace = _workspace(weight, 1)
    core = native.core()
    places = native.view(target_coords), native.view(source_slots), list(geometry), native.view(workspace), native.view(out), native.threads()
    if not transposed:
        core.tile_conv_forward(native.view(x), native.view(weight), native.view(bias), *places)
        return out
    core.tile_conv_grad_input(native.view(x), native.view(weight), *places)
    return out if bias is None else out.add_(bias[:, None, None])


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _, *places, geometry, _, transposed, backend = inputs
    ctx.save_for_backward(x, weight, *places)
    ctx.geometry, ctx.transposed, ctx.backend = geometry, transposed, backend


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, source_coords, source_slots, target_coords, target_slots = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        places = target_coords, target_slots, source_coords, source_slots
        grad_x = _between(grad, weight, None, *places, ctx.geometry, x.shape[2], not ctx.transposed, ctx.backend)
    if ctx.needs_input_grad[1]:
        kernel = list(weight.shape[2:])
        if ctx.transposed:
            grad_weight = _grad_weight(x, grad, source_coords, target_slots, ctx.geometry, kernel, ctx.backend)
        else:
            grad_weight = _grad_weight(grad, x, target_coords, source_slots, ctx.geometry, kernel, ctx.backend)
    if ctx.needs_input_grad[2]:
        grad_bias = _grad_bias(grad, ctx.backend)
    return grad_x, grad_weight, grad_bias, *[None] * 8


def _weight_fake(outer: Tensor, inner: Tensor, outer_coords: Tensor, inner_slots: Tensor, geometry: list[int], kernel: list[int],
                 backend: str = "") -> Tensor:
    shape = (outer.shape[1], inner.shape[1], *kernel)
    return torch.empty(shape, dtype=outer.dtype, device=outer.device, memory_format=torch.channels_last)


def _weight_implementation(outer: Tensor, inner: Tensor, outer_coords: Tensor, inner_slots: Tensor, geometry: list[int], kernel: list[int],
                           backend: str = "") -> Tensor:
    """Of the filters that take `inner` (the larger map) to `outer`."""
    out = _weight_fake(outer, inner, outer_coords, inner_slots, geometry, kernel)
    outer, inner = _channels_last(outer), _channels_last(inner)
    if resolve("tile_conv_between", backend, outer) == "triton":
        with gpu.guard(outer):
            gpu.triton_kernels("tile_conv_weight").grad_weight(outer, inner, outer_coords, inner_slots, geometry, out, tf32=tf32(outer))
        return out
    sums = _sums(outer, out.numel())
    native.core().tile_conv_grad_weight(native.view(outer), native.view(inner), native.view(outer_coords), native.view(inner_slots), list(geometry),
                                        native.view(sums), native.view(out), native.threads())
    return out


_between = register(
    "tile_conv_between",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor source_coords, Tensor source_slots, Tensor target_coords, Tensor target_slots, "
    "SymInt[] geometry, SymInt edge, bool transposed, str backend=\"\") -> Tensor",
    _implementation,
    _fake,
    setup_context=_setup,
    backward=_backward,
)
_grad_weight = register(
    "tile_conv_between_weight",
    "(Tensor outer, Tensor inner, Tensor outer_coords, Tensor inner_slots, SymInt[] geometry, SymInt[] kernel, str backend=\"\") -> Tensor",
    _weight_implementation,
    _weight_fake,
    setup_context=lambda ctx, inputs, output: None,
    backward=once_only("tile_conv_between"),
)
