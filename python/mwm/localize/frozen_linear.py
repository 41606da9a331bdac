"""Linear layers of frozen weights on the CPU, laid out once for oneDNN; forward and backward are the same kind of product, and nothing is kept for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CONV = ((0, 0), (1, 1), (1, 1), 1)  # padding, stride, dilation, groups
_ROWS = (512, 2048)  # oneDNN wants other layouts for fewer rows; the wrong one is laid out anew in every call, at up to ten times the price


class FrozenLinear:
    """x Wᵀ + b as a 1x1 convolution of one image whose pixels are the rows.

    On AMD oneDNN is faster than MKL at this product when the weight is already in its own layout for that many rows (bench/NOTES.md). The gradient of x is the product with a
    transposed copy of the weight. Layouts are made when they are first needed.

    Args:
        weight: float32 or bfloat16 [O, I]
        bias: [O], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self._layouts: dict[tuple[int, bool], Tensor] = {}

    def filters(self, rows: int, *, transposed: bool) -> Tensor:
        """The weight as a filter [O, I, 1, 1], or [I, O, 1, 1], for a number of rows."""
        upper = next((bound for bound in _ROWS if rows <= bound), 2 * _ROWS[-1])
        key = (upper, transposed)
        if key not in self._layouts:
            self._layouts[key] = _laid_out(self.weight.t() if transposed else self.weight, rows)
        return self._layouts[key]

    def __call__(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O]"""
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return _product(x, linear, linear.bias, transposed=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _product(gradient, ctx.linear, None, transposed=True), None


def works(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and computes in this precision."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _laid_out(weight: Tensor, rows: int) -> Tensor:
    """The weight [O, I] as a filter [O, I, 1, 1], in oneDNN's own layout where this version of torch offers that."""
    filters = weight.detach().contiguous()[:, :, None, None]
    try:
        return torch.ops.mkldnn._reorder_convolution_weight(filters, *_CONV, [1, weight.shape[1], rows, 1])
    except (AttributeError, RuntimeError, TypeError):
        return filters


def _product(x: Tensor, linear: FrozenLinear, bias: Tensor | None, *, transposed: bool) -> Tensor:
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    filters = linear.filters(rows.shape[2], transposed=transposed)
    if filters.is_mkldnn:
        out = torch.ops.mkldnn._convolution_pointwise(rows, filters, bias, *_CONV, "none", [], "")
    else:
        out = torch.mkldnn_convolution(rows, filters, bias, *_CONV)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
