"""Convolution of packed tiles: any kernel, stride, dilation and groups; hidden neighbours read as zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import native, reference_conv, tile_conv_gpu, winograd
from .backend import resolve
from .conv_geometry import conv_numbers
from .pack_tiles import check_tiles
from .plan import TilePlan
from .registry import once_only, register
from .tile_conv_gpu import depthwise


def tile_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: TilePlan,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Convolve packed tiles as conv2d convolves the unpacked map with zeros where hidden.

    out[n, k, i, j] = bias[k] + sum_{c, u, v} weight[k, c, u, v] * x~[n, c, i * s - top + u * d, j * s - left + v * d]
    where x~ reaches into the neighbouring tiles of n, however far, and is 0 where a tile is hidden and outside the image.

    Args:
        x: Packed tiles. float32 | bfloat16 | float16 | float64 [T, C, t, t]
        weight: Filters, same dtype. [K, C // groups, kh, kw]
        bias: Added at visible positions, same dtype, or None. [K]
        plan: Where the T tiles lie.
        stride: Step between windows, one number or (rows, columns), equal and a divisor of t.
        padding: One number, (rows, columns), or (left, right, top, bottom) as in F.pad.
        dilation: Step inside a window, one number or (rows, columns).
        groups: Groups of channels, up to depthwise.
        backend: Forces an implementation; None picks the best.

    Returns:
        Packed tiles, same dtype, channels-last memory. [T, K, t // s, t // s]

    Raises:
        TypeError: The dtypes of x, weight and bias differ.
        ValueError: A shape does not fit, or the dense output would not be the input divided by the stride.
        BackendError: `backend` cannot run this input; the message lists the reasons.

    Differentiable once in x, weight and bias. Deterministic, whatever the number of threads. Accumulates in float32 (float64
    for float64) and rounds once. Under autocast the three tensors are cast to its dtype, as for conv2d; the derivative in a
    float32 weight is then not rounded to that dtype on its way.
    """
    check_tiles("tile_conv", x, plan)
    x, weight, bias = _autocast(x, weight, bias)
    _check(x, weight, bias, groups)
    numbers = conv_numbers(x.shape[2], plan.grid, (weight.shape[2], weight.shape[3]), stride, padding, dilation, groups)
    return _tile_conv(x, weight, bias, *plan.tensors()[:3], numbers, backend or "")


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """In the dtype of autocast, where that is on. On the CPU a float32 weight stays as it is: the kernels round it as they read it, and a pass over memory less."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    x, bias = _cast(x, dtype), None if bias is None else _cast(bias, dtype)
    return x, weight if kind == "cpu" and rounds(x, weight) else _cast(weight, dtype), bias


def rounds(x: Tensor, weight: Tensor) -> bool:
    """Whether a float32 weight meets features of a half type, to which the kernels then round it; its derivative is float32."""
    return weight.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    if weight.dim() != 4:
        raise ValueError(f"tile_conv: weight must be [K, C // groups, kh, kw], got {list(weight.shape)}.")
    if groups < 1 or weight.shape[0] % groups or weight.shape[1] * groups != x.shape[1]:
        raise ValueError(
            f"tile_conv: weight must be [K, C // groups, kh, kw] with C = {x.shape[1]} (the channels of x) and K a multiple of "
            f"groups = {groups}, got {list(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"tile_conv: bias must be [K] with K = {weight.shape[0]} (the filters), got {list(bias.shape)}.")
    kept = torch.is_autocast_enabled(x.device.type) and rounds(x, weight)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype and not (kept and tensor is weight):
            raise TypeError(f"tile_conv: {name} must have the dtype of x ({x.dtype}), got {tensor.dtype}. Cast one of them.")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"tile_conv: {name} must lie on the device of x ({x.device}), got {tensor.device}. Move one of them.")


def _new(like: Tensor, channels: int, edge_h: int, edge_w: int) -> Tensor:
    shape = (like.shape[0], channels, edge_h, edge_w)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, coords: Tensor, slots: Tensor, geometry: list[int], backend: str
) -> Tensor:
    return _new(x, weight.shape[0], x.shape[2] // geometry[0], x.shape[3] // geometry[0])


def _implementation(
    x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, coords: Tensor, slots: Tensor, geometry: list[int], backend: str
) -> Tensor:
    way = tile_conv_gpu.choose("forward", backend, x, weight.shape, slots, geometry, x.shape[2] // geometry[0])
    if way != "cpu" or depthwise(weight.shape, geometry[7]):
        weight = weight.to(x.dtype)
    if way == "reference":
        return _fake(x, weight, bias, active, coords, slots, geometry, backend).copy_(reference_conv.forward(x, weight, bias, active, geometry))
    if way != "cpu":
        return tile_conv_gpu.forward(way, x, weight, bias, (active, coords, slots), geometry, _fake(x, weight, bias, active, coords, slots, geometry, backend))
    # A view does not keep its tensor alive, so each has a name until the kernel returns.
    x, bias = _channels_last(x), None if bias is None else bias.contiguous()
    if edge := winograd.square_edge(x, weight.shape, geometry):
        return winograd.convolve(x, weight, bias, coords, slots, edge)
    out, workspace = _fake(x, weight, bias, active, coords, slots, geometry, backend), _workspace(weight, geometry[7])
    core = native.core()
    kernel = core.depthwise_forward if depthwise(weight.shape, geometry[7]) else core.tile_conv_forward
    kernel(
        native.view(x),
        native.view(weight),
        native.view(bias),
        native.view(coords),
        native.view(slots),
        list(geometry),
        native.view(workspace),
        native.view(out),
        native.threads(),
    )
    return out


def _workspace(weight: Tensor, groups: int) -> Tensor:
    """Room for the filters in panels of at most 64 channels, in either direction; for depthwise a row of zeros."""
    filters, channels, *kernel = weight.shape
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if depthwise(weight.shape, groups):
        return torch.empty(filters, dtype=dtype)
    filters //= groups
    padded = max(channels * (filters + 63), filters * (channels + 63))
    joined = 16 // max(1, min(channels, filters, 16))
    return torch.empty(groups * joined * padded * kernel[0] * kernel[1], dtype=dtype)


def _sums(grad: Tensor, numel: int) -> Tensor:
    """Room for partial sums over fixed shares of the tiles; the number of shares depends on shapes alone."""
    rows = grad.shape[0] * grad.shape[2] * grad.shape[3]
    splits = max(1, min(8, rows // 1024, 2**18 // max(numel, 1)))
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return torch.empty((splits, numel), dtype=dtype)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _, active, coords, slots, geometry, backend = inputs
    ctx.save_for_backward(x, weight, active, coords, slots)
    ctx.geometry, ctx.backend = geometry, backend


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, active, coords, slots = ctx.saved_tensors
    plan = (active, coords, slots, ctx.geometry)
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _grad_input(grad, weight, *plan, x.shape[2], ctx.backend)
    if ctx.needs_input_grad[1]:
        grad_weight = _grad_weight(grad, x, *plan, list(weight.shape[2:]), ctx.backend, rounds(x, weight))
    if ctx.needs_input_grad[2]:
        grad_bias = _grad_bias(grad, ctx.backend)
    return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _input_fake(
    grad: Tensor, weight: Tensor, active: Tensor, coords: Tensor, slots: Tensor, geometry: list[int], edge: int, backend: str
) -> Tensor:
    return _new(grad, weight.shape[1] * geometry[7], edge, edge)


def _input_implementation(
    grad: Tensor, weight: Tensor, active: Tensor, coords: Tensor, slots: Tensor, geometry: list[int], edge: int, backend: str
) -> Tensor:
    way = tile_conv_gpu.choose("grad_input", backend, grad, weight.shape, slots, geometry, edge)
    if way != "cpu" or depthwise(weight.shape, geometry[7]):
        weight = weight.to(grad.dtype)
    if way == "reference":
        return _input_fake(grad, weight, active, coords, slots, geometry, edge, backend).copy_(reference_conv.grad_input(grad, weight, active, geometry, edge))
    if way != "cpu":
        out = _input_fake(grad, weight, active, coords, slots, geometry, edge, backend)
        return tile_conv_gpu.grad_input(way, grad, weight, (active, coords, slots), geometry, out)
    grad = _channels_last(grad)
    if square := winograd.square_edge(grad, weight.shape, geometry):
        return winograd.convolve(grad, weight, None, coords, slots, square, adjoint=True)
    out, workspace = _input_fake(grad, weight, active, coords, slots, geometry, edge, backend), _workspace(weight, geometry[7])
    core = native.core()
    kernel = core.depthwise_grad_input if depthwise(weight.shape, geometry[7]) else core.tile_conv_grad_input
    kernel(
        native.view(grad),
        native.view(weight),
        native.view(coords),
        native.view(slots),
        list(geometry),
        native.view(workspace),
        native.view(out),
        native.threads(),
    )
    return out


def _weight_fake(
    grad: Tensor, x: Tensor, active: Tensor, coords: Tensor, slots: Tensor, geometry: list[int], kernel: list[int], backend: str, wide: bool = False
) -> Tensor:
    shape = (grad.shape[1], x.shape[1] // geometry[7], *kernel)
    return torch.empty(shape, dtype=torch.float32 if wide else grad.dtype, device=grad.device, memory_format=torch.channels_last)


def _weight_implementation(
    grad: Tensor, x: Tensor, active: Tensor, coords: Tensor, slots: Tensor, geometry: list[int], kernel: list[int], backend: str, wide: bool = False
) -> Tensor:
    shape = (grad.shape[1], x.shape[1] // geometry[7], *kernel)
    way = tile_conv_gpu.choose("grad_weight", backend, x, shape, slots, geometry, grad.shape[2])
    own = way == "cpu" and not depthwise(shape, geometry[7])
    out = _weight_fake(grad, x, active, coords, slots, geometry, kernel, backend, wide and own)
    if way == "reference":
        out.copy_(reference_conv.grad_weight(grad, x, active, geometry, kernel))
    elif way != "cpu":
        out = tile_conv_gpu.grad_weight(way, grad, x, (active, coords, slots), geometry, out)
    else:
        out = _weight_of_cpu(_channels_last(grad), _channels_last(x), coords, slots, geometry, out)
    return out.to(torch.float32) if wide else out


def _weight_of_cpu(grad: Tensor, x: Tensor, coords: Tensor, slots: Tensor, geometry: list[int], out: Tensor) -> Tensor:
    if square := winograd.square_edge(grad, out.shape, geometry, weight_gradient=True):
        return winograd.grad_weight(grad, x, coords, slots, square, out)
    sums = _sums(grad, out.numel())
    core = native.core()
    kernel = core.depthwise_grad_weight if depthwise(out.shape, geometry[7]) else core.tile_conv_grad_weight
    kernel(
        native.view(grad),
        native.view(x),
        native.view(coords),
        native.view(slots),
        list(geometry),
        native.view(sums),
        native.view(out),
        native.threads(),
    )
    return out


def _bias_fake(grad: Tensor, backend: str) -> Tensor:
    return grad.new_empty(grad.shape[1])


def _bias_implementation(grad: Tensor, backend: str) -> Tensor:
    way = resolve("depthwise_conv", backend, grad)  # whose table has every implementation of this sum
    if way == "reference":
        return reference_conv.grad_bias(grad)
    if way != "cpu":
        return tile_conv_gpu.grad_bias(way, grad)
    out = _bias_fake(grad, backend)
    grad, sums = _channels_last(grad), _sums(grad, grad.shape[1])
    native.core().tile_conv_grad_bias(native.view(grad), native.view(sums), native.view(out), native.threads())
    return out


_tile_conv = register(
    "tile_conv",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor active, Tensor coords, Tensor slots, SymInt[] geometry, str backend) -> Tensor",
    _implementation,
    _fake,
    setup_context=_setup,
    backward=_backward,
)
_grad_input = register(
    "tile_conv_grad_input",
    "(Tensor grad, Tensor weight, Tensor active, Tensor coords, Tensor slots, SymInt[] geometry, SymInt edge, str backend) -> Tensor",
    _input_implementation,
    _input_fake,
    setup_context=lambda ctx, inputs, output: None,
    backward=once_only("tile_conv"),
)
_grad_weight = register(
    "tile_conv_grad_weight",
    "(Tensor grad, Tensor x, Tensor active, Tensor coords, Tensor slots, SymInt[] geometry, SymInt[] kernel, str backend, bool wide=False) -> Tensor",
    _weight_implementation,
    _weight_fake,
    setup_context=lambda ctx, inputs, output: None,
    backward=once_only("tile_conv"),
)
_grad_bias = register(
    "tile_conv_grad_bias",
    "(Tensor grad, str backend) -> Tensor",
    _bias_implementation,
    _bias_fake,
    setup_context=lambda ctx, inputs, output: None,
    backward=once_only("tile_conv"),
)
