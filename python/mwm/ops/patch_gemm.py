"""Convolutions whose windows never leave a tile and never overlap (1x1, patchify), as matrix products of torch on the packed rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fits(kernel: Sequence[int], geometry: Sequence[int]) -> bool:
    """Whether kernel (kh, kw) and geometry (as `conv_numbers` makes it) are such a convolution: kernel = stride, no padding, one group."""
    stride, dilation_h, dilation_w, *padding, groups = geometry
    return kernel[0] == kernel[1] == stride and not any(padding) and groups == 1 and (stride == 1 or dilation_h == dilation_w == 1)


def _rows(x: Tensor, step: int) -> Tensor:
    """[T, C, t, t] -> [T * (t // step)², step² * C], a view where step is 1 or t."""
    tiles, channels, edge, _ = x.shape
    last = x.permute(0, 2, 3, 1)
    windows = edge // step
    if step > 1:
        last = last.reshape(tiles, windows, step, windows, step, channels).transpose(2, 3)
    return last.reshape(tiles * windows * windows, step * step * channels)


def _tiles(rows: Tensor, tiles: int, windows: int, step: int) -> Tensor:
    """The inverse of `_rows`; channels-last memory."""
    channels = rows.shape[1] // (step * step)
    if step > 1:
        rows = rows.view(tiles, windows, windows, step, step, channels).transpose(2, 3)
    return rows.reshape(tiles, windows * step, windows * step, channels).permute(0, 3, 1, 2)


def _matrix(weight: Tensor) -> Tensor:
    """[K, C, step, step] -> [K, step² * C]"""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, C, t, t], weight [K, C, s, s], bias [K] -> [T, K, t // s, t // s]"""
    rows, matrix, step = _rows(x, weight.shape[2]), _matrix(weight).t(), weight.shape[2]
    out = torch.mm(rows, matrix) if bias is None else torch.addmm(bias, rows, matrix)
    return _tiles(out, x.shape[0], x.shape[2] // step, 1)


def grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """grad [T, K, t // s, t // s], weight [K, C, s, s] -> [T, C, t, t]"""
    return _tiles(torch.mm(_rows(grad, 1), _matrix(weight)), grad.shape[0], grad.shape[2], weight.shape[2])


def grad_weight(grad: Tensor, x: Tensor, step: int) -> Tensor:
    """grad [T, K, t // s, t // s], x [T, C, t, t] -> [K, C, s, s], channels-last memory"""
    matrix = torch.mm(_rows(grad, 1).t(), _rows(x, step))
    return matrix.view(grad.shape[1], step, step, x.shape[1]).permute(0, 3, 1, 2)
