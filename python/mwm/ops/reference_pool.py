"""The meaning of `tile_pool` and its derivative in plain torch, on the dense map, from the bool `active` alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .pool_geometry import PoolGeometry
from .reference import pack_tiles, spread, unpack_tiles


def _pad(x: Tensor, geometry: PoolGeometry, size: tuple[int, int], value: float) -> Tensor:
    """Pad so that floor-mode windows give exactly the wanted output size; what ceil_mode adds lies right and below."""
    height, width = x.shape[2:]
    need_h, need_w = geometry.reach(size)
    extra_h = need_h - geometry.top - height
    extra_w = need_w - geometry.left - width
    return F.pad(x, (geometry.left, extra_w, geometry.top, extra_h), value=value)


def forward(x: Tensor, active: Tensor, geometry: PoolGeometry) -> tuple[Tensor, Tensor]:
    """(out [T, C, t/s, t/s], taps int16 of the same shape for max, else empty)."""
    dense = unpack_tiles(x, active)
    size = geometry.output_size(dense.shape[2], dense.shape[3])
    if geometry.mode == "avg":
        sums = F.avg_pool2d(_pad(dense, geometry, size, 0.0), geometry.kernel, geometry.stride, divisor_override=1)
        return pack_tiles(sums / divisors(dense, geometry, size), active), x.new_empty(0, dtype=torch.int16)
    fill = float("-inf") if geometry.pad_value is None else geometry.pad_value
    padded = _pad(dense, geometry, size, float("-inf"))
    inner = torch.ones_like(dense[:1, :1], dtype=torch.bool)
    explicit = F.pad(inner, (geometry.left, geometry.right, geometry.top, geometry.bottom), value=True)
    image = F.pad(inner, (geometry.left, geometry.right, geometry.top, geometry.bottom), value=False)
    extra = (0, padded.shape[3] - explicit.shape[3], 0, padded.shape[2] - explicit.shape[2])
    explicit, image = F.pad(explicit, extra, value=False), F.pad(image, extra, value=False)
    padded = torch.where(explicit & ~image, fill, padded)
    out, index = F.max_pool2d(padded, geometry.kernel, geometry.stride, dilation=geometry.dilation, return_indices=True)
    row = index // padded.shape[3] - torch.arange(size[0], device=x.device)[:, None] * geometry.stride[0]
    column = index % padded.shape[3] - torch.arange(size[1], device=x.device) * geometry.stride[1]
    taps = row // geometry.dilation[0] * geometry.kernel[1] + column // geometry.dilation[1]
    seen = F.pad(spread(active, x.shape[2]), (geometry.left, geometry.right, geometry.top, geometry.bottom), value=False)
    seen = F.pad(seen, extra, value=False).expand(padded.shape)
    wins = seen.flatten(2).gather(2, index.flatten(2)).reshape(index.shape)
    return pack_tiles(out, active), pack_tiles(torch.where(wins, taps, -1).to(torch.int16), active)


def divisors(dense: Tensor, geometry: PoolGeometry, size: tuple[int, int]) -> Tensor:
    """Divisor of each window as torch's dense op has it. [1, 1, H/s, W/s]"""
    if geometry.divisor:
        return torch.full((1, 1, *size), float(geometry.divisor), dtype=dense.dtype, device=dense.device)
    counted = torch.ones((1, 1, *dense.shape[2:]), dtype=torch.float32, device=dense.device)
    border = 1.0 if geometry.count_include_pad else 0.0
    counted = F.pad(counted, (geometry.left, geometry.right, geometry.top, geometry.bottom), value=border)
    need_h, need_w = geometry.reach(size)
    counted = F.pad(counted, (0, need_w - counted.shape[3], 0, need_h - counted.shape[2]), value=0.0)
    return F.avg_pool2d(counted, geometry.kernel, geometry.stride, divisor_override=1).to(dense.dtype)


def backward(grad: Tensor, taps: Tensor, active: Tensor, geometry: PoolGeometry, edge: int) -> Tensor:
    """Gradient with respect to the packed input. [T, C, t, t]"""
    batch, rows, columns = active.shape
    height, width = rows * edge, columns * edge
    dense_grad = unpack_tiles(grad, active)
    size = (dense_grad.shape[2], dense_grad.shape[3])
    need_h, need_w = geometry.reach(size)
    full = grad.new_zeros((batch, grad.shape[1], need_h, need_w))
    if geometry.mode == "avg":
        share = dense_grad / divisors(grad.new_empty((1, 1, height, width)), geometry, size)
        for row in range(geometry.kernel[0]):
            for column in range(geometry.kernel[1]):
                full[:, :, row :: geometry.stride[0], column :: geometry.stride[1]][:, :, : size[0], : size[1]] += share
    else:
        dense_taps = unpack_tiles(taps.to(torch.int64), active, -1.0)
        wins = dense_taps >= 0
        row = torch.arange(size[0], device=grad.device)[:, None] * geometry.stride[0]
        column = torch.arange(size[1], device=grad.device) * geometry.stride[1]
        row = row + dense_taps // geometry.kernel[1] * geometry.dilation[0]
        column = column + dense_taps % geometry.kernel[1] * geometry.dilation[1]
        index = torch.where(wins, row * need_w + column, 0).flatten(2)
        full.flatten(2).scatter_add_(2, index, torch.where(wins, dense_grad, 0).flatten(2))
    inside = F.pad(full, (0, max(0, geometry.left + width - need_w), 0, max(0, geometry.top + height - need_h)))
    inside = inside[:, :, geometry.top : geometry.top + height, geometry.left : geometry.left + width]
    return pack_tiles(inside, active)
