"""The meaning of `tile_conv` and its derivatives in plain torch: on the dense map, zero where hidden, from the bool `active` alone.

Written apart from the plan code and the kernels, so that they cannot share an index error with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import pack_tiles, unpack_tiles

# geometry: [stride, dilation of rows, of columns, padding left, right, top, bottom, groups]


def _dense(x: Tensor, active: Tensor, geometry: list[int]) -> Tensor:
    return F.pad(unpack_tiles(x, active), tuple(geometry[3:7]))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, geometry: list[int]) -> Tensor:
    """x [T, C, t, t], weight [K, C / groups, kh, kw], bias [K] -> [T, K, t/s, t/s]"""
    stride, *dilation = geometry[:3]
    dense = _dense(x, active, geometry)
    if dense.shape[0] == 0:
        return x.new_zeros((0, weight.shape[0], x.shape[2] // stride, x.shape[3] // stride))
    return pack_tiles(F.conv2d(dense, weight, bias, stride, 0, tuple(dilation), geometry[7]), active)


def _backward(grad: Tensor, dense: Tensor, weight: Tensor, active: Tensor, geometry: list[int], wanted: list[bool]) -> tuple:
    stride, *dilation = geometry[:3]
    return torch.ops.aten.convolution_backward(
        unpack_tiles(grad, active), dense, weight, None, [stride, stride], [0, 0], dilation, False, [0, 0], geometry[7], wanted
    )


def grad_input(grad: Tensor, weight: Tensor, active: Tensor, geometry: list[int], edge: int) -> Tensor:
    """grad [T, K, t/s, t/s] -> [T, C, t, t]"""
    channels = weight.shape[1] * geometry[7]
    empty = grad.new_zeros((grad.shape[0], channels, edge, edge))
    if active.shape[0] == 0:
        return empty
    dense = _dense(empty, active, geometry)
    left, right, top, bottom = geometry[3:7]
    full = _backward(grad, dense, weight, active, geometry, [True, False, False])[0]
    return pack_tiles(full[:, :, top : full.shape[2] - bottom, left : full.shape[3] - right], active)


def grad_weight(grad: Tensor, x: Tensor, active: Tensor, geometry: list[int], kernel: list[int]) -> Tensor:
    """grad [T, K, t/s, t/s], x [T, C, t, t] -> [K, C / groups, kh, kw]"""
    weight = grad.new_zeros((grad.shape[1], x.shape[1] // geometry[7], *kernel))
    if active.shape[0] == 0:
        return weight
    return _backward(grad, _dense(x, active, geometry), weight, active, geometry, [False, True, False])[1]


def grad_bias(grad: Tensor) -> Tensor:
    """grad [T, K, t/s, t/s] -> [K]"""
    wide = grad.to(torch.float64 if grad.dtype == torch.float64 else torch.float32)
    return wide.sum((0, 2, 3)).to(grad.dtype)
