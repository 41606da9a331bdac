"""3x3 convolution by Winograd's minimal filtering on the CPU: when it pays, and the calls of its kernels.

F(m x m, 3 x 3) makes m x m outputs of (m + 2)^2 products a channel pair instead of 9 m^2: 2.25 times fewer for m = 2, 4 times fewer
for m = 4. Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (arXiv 1509.09308).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native

# Below so many channels the transforms cost what the products save (bench/NOTES.md, Winograd).
LEAST_CHANNELS = 24
# Filters a square of m = 4 may share at most: transformed filters are written and read again at memory's pace.
MOST_FILTERS_PER_SQUARE = 512
# Squares from which on tiles of edge 2 are worth the filters' transform: the direct kernel skips their hidden neighbours, of which they have most.
LEAST_SQUARES_AT_2 = 160
PLAIN = [1, 1, 1, 1, 1, 1, 1, 1]  # stride, dilation, padding, groups: ops/conv_geometry.py


def square_edge(like: Tensor, weight_shape: Sequence[int], geometry: Sequence[int], *, weight_gradient: bool = False) -> int:
    """Edge m of the output squares with which a convolution is computed best, or 0: by the direct kernel.

    Args:
        like: Features or gradient, for dtype and size. [T, C or K, h, w]
        weight_shape: (K, C // groups, kh, kw).
        geometry: As `conv_numbers` returns it; anything but stride 1, padding 1, one group is direct.
        weight_gradient: The derivative in the filters is asked for.

    A table by shape class, measured (bench/NOTES.md). float32 takes m = 2 alone: the rounding error of m = 4 is several times
    that of the direct convolution. The half types are computed in float32, where m = 4 stays below their own rounding and undercuts
    their direct products, and m = 2 does not.
    """
    filters, channels, *kernel = weight_shape
    if kernel != [3, 3] or list(geometry) != PLAIN or min(channels, filters) < LEAST_CHANNELS:
        return 0
    height, width = like.shape[2:]
    if like.dtype == torch.float32 and min(height, width) >= 2:
        small = min(height, width) < 4
        squares = like.shape[0] * -(-height // 2) * -(-width // 2)
        return 0 if small and (weight_gradient or squares < LEAST_SQUARES_AT_2) else 2
    if like.dtype in (torch.bfloat16, torch.float16) and min(height, width) >= 8:
        squares = like.shape[0] * -(-height // 4) * -(-width // 4)
        return 4 if channels * filters <= MOST_FILTERS_PER_SQUARE * squares else 0
    return 0


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, coords: Tensor, slots: Tensor, edge: int, *, adjoint: bool = False) -> Tensor:
    """The convolution (adjoint: its derivative in the input) of tiles of any height and width.

    Args:
        x: Channels-last memory. float32 | bfloat16 | float16 [S, C, h, w]; adjoint [S, K, h, w]
        weight: Same dtype, or float32, which is rounded to it; any strides. [K, C, 3, 3]
        bias: Same dtype, contiguous, or None. [K]; adjoint [C]
        coords: Tiles written, (image, row, column). int32 [T, 3]
        slots: Tile of x of each patch, -1 where there is none. int32 [B, Gh, Gw]
        edge: m, 2 or 4.
        adjoint: Derivative in the input.

    Returns:
        Channels-last memory. [T, K, h, w]; adjoint [T, C, h, w]
    """
    filters, channels = weight.shape[:2]
    out_channels, in_channels = (channels, filters) if adjoint else (filters, channels)
    shape = (coords.shape[0], out_channels, x.shape[2], x.shape[3])
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    workspace = torch.empty((edge + 2) ** 2 * in_channels * _padded(out_channels), dtype=torch.float32)
    native.core().winograd_conv(native.view(x), native.view(weight), native.view(bias), native.view(coords), native.view(slots), edge,
                                int(adjoint), native.view(workspace), native.view(out), native.threads())
    return out


def grad_weight(grad: Tensor, x: Tensor, coords: Tensor, slots: Tensor, edge: int, out: Tensor) -> Tensor:
    """The derivative in the filters, written into `out` and returned.

    Args:
        grad: Gradient of the output, channels-last memory. [T, K, h, w]
        x: Same dtype, channels-last memory. [S, C, h, w]
        coords, slots, edge: As in `convolve`.
        out: Same dtype or float32. [K, C, 3, 3]
    """
    filters, channels = grad.shape[1], x.shape[1]
    elements = (edge + 2) ** 2 * _padded(filters) * _padded(channels)
    count = grad.shape[0] * -(-grad.shape[2] // edge) * -(-grad.shape[3] // edge)
    # Shares of the squares with sums of their own, where these fit a core's cache; the number depends on shapes alone.
    splits = min(8, max(1, count // 128)) if elements <= 2**19 else 1
    sums = torch.empty((splits, elements), dtype=torch.float32)
    native.core().winograd_grad_weight(native.view(grad), native.view(x), native.view(coords), native.view(slots), edge, native.view(sums),
                                       native.view(out), native.threads())
    return out


def _padded(channels: int) -> int:
    return (channels + 15) // 16 * 16
