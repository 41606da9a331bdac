"""`tile_conv` and its derivatives on a GPU: which of the ways runs a layer, and the call.

Ways: "gemm" (1x1 and patchify: torch's matrix products on the packed rows), "dense" (where the shipped table says that the dense
convolution is faster), "triton" (implicit GEMM; depthwise too), "cuda" (depthwise). The choice depends on shapes, dtype and device alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import gpu, native, patch_gemm
from .backend import FLOATS, GPU_FLOATS, declare, resolve

declare("tile_conv", cpu=FLOATS, triton=GPU_FLOATS, reference=FLOATS)
declare("depthwise_conv", cpu=FLOATS, cuda=GPU_FLOATS, triton=GPU_FLOATS, reference=FLOATS)

_MOST_SHARES = 256


def depthwise(weight_shape: Sequence[int], groups: int) -> bool:
    """Whether every channel has one filter of its own."""
    return weight_shape[0] == groups and weight_shape[1] == 1


def choose(direction: str, backend: str, x: Tensor, weight_shape: Sequence[int], slots: Tensor, geometry: list[int], edge: int) -> str:
    """"cpu", "reference", or one of the ways of this file.

    Args:
        direction: "forward", "grad_input" or "grad_weight".
        backend: What the caller asked for, or "".
        x: The map that is read, or the output's gradient.
        weight_shape: [K, C // groups, kh, kw]
        slots: int32 [B, Gh, Gw]
        geometry: As `conv_numbers` makes it.
        edge: Edge of the tiles of the result; of the output's gradient where that of the weight is asked for.
    """
    automatic = not backend and x.device.type == "cuda"
    if automatic and patch_gemm.fits(weight_shape[2:], geometry):
        return "gemm"
    own = depthwise(weight_shape, geometry[7])
    name = resolve("depthwise_conv" if own else "tile_conv", backend, x)
    if name == "triton" and automatic and not own and _dense_is_faster(direction, x, weight_shape, slots, geometry, edge):
        return "dense"
    return name


def _dense_is_faster(direction: str, x: Tensor, weight_shape: Sequence[int], slots: Tensor, geometry: list[int], edge: int) -> bool:
    # In float32 torch's convolution would use TF32 unless told otherwise.
    if x.dtype == torch.float32 or slots.numel() == 0:
        return False
    configs, groups = gpu.triton_kernels("conv_configs"), geometry[7]
    filters, channels = weight_shape[0] // groups, weight_shape[1]
    lattice = edge // geometry[0] if direction == "grad_input" else edge
    columns, depth = (channels, filters) if direction == "grad_input" else (filters, channels)
    rule = configs.pick("tile_conv", direction, "16", x.shape[0] * lattice * lattice, columns, depth, configs.device_name(x.device))
    return x.shape[0] >= rule.get("dense_from", 2.0) * slots.numel()


def tf32(x: Tensor) -> bool:
    """Whether float32 operands may be rounded to TF32: only where the user has set so for matrix products."""
    return x.dtype == torch.float32 and x.device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"


def channels_last(x: Tensor) -> Tensor:
    """The tensor in channels-last memory, as the kernels read it."""
    return x.contiguous(memory_format=torch.channels_last)


def forward(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, place: tuple[Tensor, Tensor, Tensor], geometry: list[int], out: Tensor) -> Tensor:
    """The way `name` of the forward pass; `place` is (active, coords, slots), `out` has the shape of the result."""
    _, coords, slots = place
    if name == "gemm":
        return patch_gemm.forward(x, weight, bias)
    if name == "dense":
        return _packed(_dense_conv(_unpacked(x, place), weight, bias, geometry), place)
    x, bias, own = channels_last(x), None if bias is None else bias.contiguous(), depthwise(weight.shape, geometry[7])
    with gpu.guard(x):
        if name == "cuda":
            views = (native.view(x), native.view(weight), native.view(bias), native.view(coords), native.view(slots))
            gpu.cuda().depthwise_forward(*views, list(geometry), native.view(out), *gpu.launch(x))
        elif own:
            gpu.triton_kernels("depthwise").forward(x, weight.contiguous(), bias, coords, slots, geometry, out)
        else:
            gpu.triton_kernels("tile_conv").forward(x, channels_last(weight), bias, coords, slots, geometry, out, tf32=tf32(x))
    return out


def grad_input(name: str, grad: Tensor, weight: Tensor, place: tuple[Tensor, Tensor, Tensor], geometry: list[int], out: Tensor) -> Tensor:
    """The way `name` of the gradient in x."""
    _, coords, slots = place
    if name == "gemm":
        return patch_gemm.grad_input(grad, weight)
    if name == "dense":
        # Only the shape of the input counts here.
        like = grad.new_empty(1).expand(slots.shape[0], out.shape[1], slots.shape[1] * out.shape[2], slots.shape[2] * out.shape[3])
        return _packed(_dense_backward(_unpacked(grad, place), like, weight, geometry, 0), place)
    grad, own = channels_last(grad), depthwise(weight.shape, geometry[7])
    with gpu.guard(grad):
        if name == "cuda":
            views = (native.view(grad), native.view(weight), native.view(coords), native.view(slots))
            gpu.cuda().depthwise_grad_input(*views, list(geometry), native.view(out), *gpu.launch(grad))
        elif own:
            gpu.triton_kernels("depthwise").grad_input(grad, weight.contiguous(), coords, slots, geometry, out)
        else:
            gpu.triton_kernels("tile_conv").grad_input(grad, channels_last(weight), None, coords, slots, geometry, out, tf32=tf32(grad))
    return out


def grad_weight(name: str, grad: Tensor, x: Tensor, place: tuple[Tensor, Tensor, Tensor], geometry: list[int], out: Tensor) -> Tensor:
    """The way `name` of the gradient in weight."""
    _, coords, slots = place
    if name == "gemm":
        return patch_gemm.grad_weight(grad, x, geometry[0])
    if name == "dense":
        return channels_last(_dense_backward(_unpacked(grad, place), _unpacked(x, place), out, geometry, 1))
    grad, x, own = channels_last(grad), channels_last(x), depthwise(out.shape, geometry[7])
    with gpu.guard(x):
        if name == "cuda":
            shares = max(1, min(_MOST_SHARES, x.shape[0], 1056 // -(-x.shape[1] // 32)))
            sums = torch.empty((shares, out.numel()), dtype=torch.float32, device=x.device)
            views = (native.view(grad), native.view(x), native.view(coords), native.view(slots))
            gpu.cuda().depthwise_grad_weight(*views, list(geometry), native.view(sums), native.view(out), *gpu.launch(x))
        elif own:
            gpu.triton_kernels("depthwise").grad_weight(grad, x, coords, slots, geometry, out)
        else:
            gpu.triton_kernels("tile_conv_weight").grad_weight(grad, x, coords, slots, geometry, out, tf32=tf32(x))
    return out


def grad_bias(name: str, grad: Tensor) -> Tensor:
    """The gradient in bias: "cuda" by its kernel, else by torch's sum, which is in float32 and repeats bit for bit."""
    if name != "cuda":
        return grad.sum((0, 2, 3), dtype=torch.float32).to(grad.dtype)
    grad, out = channels_last(grad), grad.new_empty(grad.shape[1])
    rows = grad.shape[0] * grad.shape[2] * grad.shape[3]
    with gpu.guard(grad):
        sums = torch.empty((max(1, min(_MOST_SHARES, rows // 256)), grad.shape[1]), dtype=torch.float32, device=grad.device)
        gpu.cuda().tile_conv_grad_bias(native.view(grad), native.view(sums), native.view(out), *gpu.launch(grad))
    return out


def _unpacked(x: Tensor, place: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return torch.ops.mwm.unpack_tiles(x, *place, 0.0, "")


def _packed(x: Tensor, place: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return torch.ops.mwm.pack_tiles(x, *place, "")


def _margins(geometry: list[int]) -> tuple[list[int], list[int], bool]:
    """Padding for torch's convolution (rows, columns), for F.pad before it, and whether the latter is needed."""
    left, right, top, bottom = geometry[3:7]
    even = left == right and top == bottom
    return [top, left] if even else [0, 0], [left, right, top, bottom], not even


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Inside, cuDNN takes algorithms only that give the same bits every time, whatever the user allows elsewhere."""
    before = torch.backends.cudnn.deterministic
    if before:
        yield
        return
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _dense_conv(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[int]) -> Tensor:
    padding, sides, uneven = _margins(geometry)
    x = torch.nn.functional.pad(x, sides) if uneven else x
    with repeatable():
        return torch.nn.functional.conv2d(x, channels_last(weight), bias, geometry[0], padding, geometry[1:3], geometry[7])


def _dense_backward(grad: Tensor, x: Tensor, weight: Tensor, geometry: list[int], which: int) -> Tensor:
    padding, (left, right, top, bottom), uneven = _margins(geometry)
    if uneven:
        height, width = x.shape[2] + top + bottom, x.shape[3] + left + right
        x = torch.nn.functional.pad(x, (left, right, top, bottom)) if which else x[:, :, :1, :1].expand(-1, -1, height, width)
    wanted = [which == 0, which == 1, False]
    strides, dilation = [geometry[0]] * 2, geometry[1:3]
    with repeatable():
        found = torch.ops.aten.convolution_backward(grad, x, channels_last(weight), None, strides, padding, dilation, False, [0, 0], geometry[7], wanted)[which]
    if uneven and not which:
        found = found[:, :, top : found.shape[2] - bottom, left : found.shape[3] - right]
    return found
