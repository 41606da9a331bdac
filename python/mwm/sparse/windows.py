"""Functions whose windows look sideways: convolution, pooling, padding, interpolation. Each knows the neighbours of a tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mwm.ops import pack_tiles, tile_conv, tile_pool, unpack_tiles
from mwm.ops.pointwise_conv import pointwise_conv

from .extent import Extent
from .operands import map_of
from .packed import Margin, Packed
from .recompute import spared
from .reductions import image_max, image_mean
from .refusal import location, refuse
from .registry import handles, named
from .strides import check_step


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return int(value), int(value)
    values = [int(v) for v in value]
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


def _bind(names: Sequence[str], args: tuple, kwargs: dict, defaults: dict) -> list:
    if len(args) == len(names) and not kwargs:  # as torch.nn's layers call
        return list(args)
    given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
    return [given.get(name) for name in names]


def on_dense_map(function: Callable, x: Packed, run: Callable[[Tensor], Tensor], *, pad: bool = True) -> Packed:
    """Run on the unpacked map, zero where hidden, and pack the result: right for whatever aligns with the grid, at dense cost."""
    plan, margin = x._plan, x._margin
    dense = unpack_tiles(x._data, plan)
    if margin is not None and pad:
        sides = margin[:4]
        dense = F.pad(dense, sides, margin.mode, margin.value) if margin.mode == "constant" else F.pad(dense, sides, margin.mode)
    out = run(dense)
    rows, columns = plan.grid
    height, width = out.shape[-2:]
    edge = height // rows
    if edge * rows != height or edge * columns != width or edge < 1 or plan.patch_size % edge:
        raise refuse(function, f"its output of {height} x {width} does not divide into the {rows} x {columns} patches",
                     "Choose the padding so that the output is the input divided by the stride.")
    return x._like(pack_tiles(out, plan))


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@handles(F.conv2d)
def conv2d(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """conv2d with hidden neighbours zero; pending zero padding is added to its own."""
    x, weight, bias, stride, padding, dilation, groups = _bind(_CONV, args, kwargs, {"stride": 1, "padding": 0, "dilation": 1, "groups": 1})
    x = map_of(function, x)
    stride, dilation = _pair(stride), _pair(dilation)
    kernel = (weight.shape[-2], weight.shape[-1])
    sides = _sides(padding, kernel, dilation)
    if stride[0] != stride[1]:
        raise refuse(function, f"its stride {stride} differs for rows and columns, so that tiles would not stay square")
    check_step(function, x, stride[0])
    margin = x._margin
    if margin is not None:
        if margin.mode != "constant" or margin.value != 0.0 or min(margin[:4]) < 0:
            return on_dense_map(function, x, lambda dense: F.conv2d(F.pad(dense, sides), weight, bias, stride, 0, dilation, groups))
        sides = tuple(own + pending for own, pending in zip(sides, margin[:4], strict=True))
    # Traced code may not know the number of tiles at all, which inductor's convolution needs; tile_conv does not.
    if kernel == (1, 1) and stride == (1, 1) and groups == 1 and not any(sides) and not torch.compiler.is_compiling() and x._data.shape[0] > 0:
        with spared(x._data):
            return x._like(pointwise_conv(x._data, weight, bias))
    try:
        with spared(x._data):
            out = tile_conv(x._data, weight, bias, x._plan, stride=stride, padding=sides, dilation=dilation, groups=groups)
    except ValueError as error:
        raise _misaligned(function, error) from error
    return x._like(out)


def _misaligned(function: Callable, error: ValueError) -> ValueError:
    if "divided by the stride" not in str(error):
        return error
    op, _, finding = str(error).partition(":")
    return ValueError(f"mwm.Packed: {op}{location()}:{finding}")


def _sides(padding: Any, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, ...]:
    """(left, right, top, bottom)"""
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        rows, columns = dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1)
        return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2
    rows, columns = _pair(padding)
    return columns, columns, rows, rows


@handles(F.conv_transpose2d)
def conv_transpose2d(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """On the tiles where windows do not overlap, else on the dense map."""
    x = map_of(function, args[0] if args else kwargs["input"])
    if x._margin is not None:
        raise refuse(function, "padding is pending")
    return on_dense_map(function, x, lambda dense: function(dense, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"}))


_MAX = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


@handles(F.max_pool2d, torch.max_pool2d)
def max_pool2d(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """max_pool2d: a hidden neighbour is 0, the image's padding minus infinity, or what was padded before."""
    x, kernel, stride, padding, dilation, ceil_mode, indices = _bind(_MAX, args, kwargs, {"padding": 0, "dilation": 1, "ceil_mode": False})
    x = map_of(function, x)
    if indices:
        raise refuse(function, "indices of maxima are those of the dense map", "Leave return_indices out.")
    if _whole_map(kernel):
        return image_max(x, keepdim=True)
    kernel, dilation = _pair(kernel), _pair(dilation)
    stride = kernel if stride is None or stride == [] else _pair(stride)
    return _pooled(function, x, kernel, stride, _pair(padding), {"mode": "max", "dilation": dilation, "ceil_mode": ceil_mode},
                   lambda dense: F.max_pool2d(dense, kernel, stride, padding, dilation, ceil_mode))


_AVG = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


@handles(F.avg_pool2d)
def avg_pool2d(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """avg_pool2d: a hidden neighbour counts as a position of value 0."""
    x, kernel, stride, padding, ceil_mode, include, divisor = _bind(_AVG, args, kwargs,
                                                                    {"padding": 0, "ceil_mode": False, "count_include_pad": True})
    x = map_of(function, x)
    if _whole_map(kernel):
        return image_mean(x, keepdim=True)
    kernel = _pair(kernel)
    stride = kernel if stride is None or stride == [] else _pair(stride)
    return _pooled(function, x, kernel, stride, _pair(padding),
                   {"mode": "avg", "ceil_mode": ceil_mode, "count_include_pad": include, "divisor_override": divisor},
                   lambda dense: F.avg_pool2d(dense, kernel, stride, padding, ceil_mode, include, divisor))


def _whole_map(kernel: Any) -> bool:
    """Whether the window is the map itself, as in avg_pool2d(x, x.shape[2:])."""
    sizes = kernel if isinstance(kernel, tuple | list | torch.Size) else (kernel,)
    return all(isinstance(size, Extent) for size in sizes)


def _pooled(function: Callable, x: Packed, kernel: tuple, stride: tuple, padding: tuple, settings: dict, dense: Callable) -> Packed:
    if stride[0] != stride[1]:
        raise refuse(function, f"its stride {stride} differs for rows and columns, so that tiles would not stay square")
    check_step(function, x, stride[0])
    sides = (padding[1], padding[1], padding[0], padding[0])
    margin = x._margin
    if margin is not None:
        own = any(sides)
        simple = margin.mode == "constant" and min(margin[:4]) >= 0 and not settings["ceil_mode"]
        if settings["mode"] == "max" and simple and (margin.value == float("-inf") or not own):
            settings = {**settings, "pad_value": None if margin.value == float("-inf") else margin.value}
        elif settings["mode"] == "avg" and simple and margin.value == 0.0 and not own:
            # Padding made by F.pad is part of the map for the pool, which then counts it.
            settings = {**settings, "count_include_pad": True}
        else:
            return on_dense_map(function, x, dense)
        sides = tuple(own + pending for own, pending in zip(sides, margin[:4], strict=True))
    try:
        return x._like(tile_pool(x._data, x._plan, kernel_size=kernel, stride=stride, padding=sides, **settings))
    except ValueError as error:
        raise _misaligned(function, error) from error


@handles(F.adaptive_avg_pool2d, F.adaptive_max_pool2d)
def adaptive_pool2d(function: Callable, args: tuple, kwargs: dict) -> Tensor:
    """To one value: over the visible positions of each image. To a larger size: of the dense map, zero where hidden, as a plain tensor."""
    x, size, indices = _bind(("input", "output_size", "return_indices"), args, kwargs, {"return_indices": False})
    x = map_of(function, x)
    if x._margin is not None or indices:
        raise refuse(function, "padding is pending" if not indices else "indices of maxima are those of the dense map")
    sizes = (size, size) if isinstance(size, int) else tuple(size)
    if any(isinstance(s, Extent) or s is None for s in sizes):
        raise refuse(function, "its output size is that of a tile")
    if sizes == (1, 1):
        return image_mean(x, keepdim=True) if function is F.adaptive_avg_pool2d else image_max(x, keepdim=True)
    return function(x.unpack(), sizes)


@handles(F.pad, torch.constant_pad_nd)
def pad(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """Padding of rows and columns waits for the convolution or pooling that reads it; padding of channels is done at once."""
    x, sides, mode, value = _bind(("input", "pad", "mode", "value"), args, kwargs, {"mode": "constant"})
    if function is torch.constant_pad_nd:
        mode, value = "constant", args[2] if len(args) > 2 else kwargs.get("value", 0)
    if not isinstance(x, Packed):
        raise refuse(function, "packed tiles stand in the place of a size")
    sides = [int(side) for side in sides]
    by_axis = {axis: tuple(sides[2 * i : 2 * i + 2]) for i, axis in enumerate(reversed(range(len(x._axes)))) if 2 * i < len(sides)}
    spatial = {x._axes[axis]: amount for axis, amount in by_axis.items() if x._axes[axis] in "THW" and any(amount)}
    if not spatial and mode == "constant" and x._margin is None:
        return x._like(F.pad(x._data, sides, mode, value))
    x = map_of(function, x)
    if "T" in spatial or any(any(amount) for axis, amount in by_axis.items() if x._axes[axis] == "C"):
        raise refuse(function, "it pads channels or images together with rows or columns")
    (left, right), (top, bottom) = spatial.get("W", (0, 0)), spatial.get("H", (0, 0))
    margin = Margin(left, right, top, bottom, mode, float(value or 0.0))
    if x._margin is not None:
        if (x._margin.mode, x._margin.value) != (mode, margin.value) or mode != "constant" or min((*x._margin[:4], *margin[:4])) < 0:
            raise refuse(function, "other padding is still pending")
        margin = Margin(*(a + b for a, b in zip(x._margin[:4], margin[:4], strict=True)), mode, margin.value)
    return x._like(x._data, margin=margin if any(margin[:4]) else None)


@handles(F.interpolate, F.upsample, *named(["upsample_nearest", "upsample_bilinear"], (F,)))
def interpolate(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """By a whole factor, up or down: nearest on the tiles, smooth modes on the dense map."""
    names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
    x, size, scale, mode, corners, _, antialias = _bind(names, args, kwargs, {"mode": "nearest"})
    x = map_of(function, x)
    if x._margin is not None:
        raise refuse(function, "padding is pending")
    if function.__name__ == "upsample_bilinear":
        mode, corners = "bilinear", True
    edge = x._data.shape[-1]
    if size is not None:
        sizes = (size, size) if isinstance(size, int) else tuple(size)
        if not all(isinstance(s, Extent) for s in sizes) or sizes[0] != sizes[1]:
            raise refuse(function, f"a fixed size {tuple(map(int, sizes))} says nothing about tiles", "Give the shape of another map, or scale_factor.")
        new = int(sizes[0])
        scale = new / edge
    else:
        factors = (scale, scale) if isinstance(scale, int | float) else tuple(scale)
        scale = float(factors[0])
        new = round(edge * scale)
        if factors[0] != factors[-1] or new != edge * scale:
            raise refuse(function, f"scale_factor {factors} does not turn tiles of edge {edge} into whole square tiles")
    whole = new >= 1 and (new % edge == 0 or edge % new == 0)
    if not whole:
        raise refuse(function, f"tiles of edge {edge} do not become tiles by the factor {scale:g}")
    if mode in ("nearest", "nearest-exact") and new >= edge:
        return x._like(F.interpolate(x._data, size=(new, new), mode=mode))
    rows, columns = x._plan.grid
    options = {} if mode in ("nearest", "nearest-exact", "area") else {"align_corners": corners, "antialias": bool(antialias)}
    return on_dense_map(function, x, lambda dense: F.interpolate(dense, size=(rows * new, columns * new), mode=mode, **options))
