"""The rival: sparse convolution emulated by dense convolution times the mask.

The semantics are those of submanifold convolution as SparK emulates them (arXiv 2301.03580, §3.1): every layer that looks
sideways runs densely and its output is multiplied by the mask; every norm gathers the visible positions, normalises them as
a list and scatters the result back. It computes what `mwm.sparsify` computes, at the price of the dense network and of one
host synchronisation per norm. Own writing; it serves as the rival in the benches and as a check in the demo.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Mask:
    """The visible patches of the batch in flight, shared by all layers of one network."""

    def __init__(self) -> None:
        self.active: Tensor | None = None  # bool [B, Gh, Gw]

    def at(self, x: Tensor) -> Tensor:
        """The mask at the resolution of `x` [B, C, H, W]. bool [B, 1, H, W]"""
        active = self.active
        if active is None:
            raise ValueError("mask_multiply: set the mask with `network(images, active)` before a layer runs.")
        rows, columns = x.shape[2] // active.shape[1], x.shape[3] // active.shape[2]
        return active.repeat_interleave(rows, 1).repeat_interleave(columns, 2)[:, None]


class _Masked(nn.Module):
    """A layer whose output is multiplied by the mask."""

    def __init__(self, layer: nn.Module, mask: _Mask) -> None:
        super().__init__()
        self.layer, self.mask = layer, mask

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y *= self.mask.at(y)  # in place, as SparK does it
        return y


class _Gathered(nn.Module):
    """A batch or layer norm that sees visible positions only: gather, normalise, scatter."""

    def __init__(self, layer: nn.Module, mask: _Mask) -> None:
        super().__init__()
        self.layer, self.mask = layer, mask

    def forward(self, x: Tensor) -> Tensor:
        batch_index, row, column = self.mask.at(x)[:, 0].nonzero(as_tuple=True)
        rows = x.permute(0, 2, 3, 1)[batch_index, row, column]
        layer = self.layer
        if isinstance(layer, nn.BatchNorm2d):
            rows = F.batch_norm(rows, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.training,
                                layer.momentum, layer.eps)
            after = [getattr(layer, name, None) for name in ("drop", "act")]  # timm's BatchNormAct2d
            for step in after:
                rows = rows if step is None else step(rows)
        else:
            rows = F.layer_norm(rows, layer.normalized_shape, layer.weight, layer.bias, layer.eps)
        y = torch.zeros_like(x)
        y.permute(0, 2, 3, 1)[batch_index, row, column] = rows.to(y.dtype)
        return y


class _GatheredLast(_Gathered):
    """A layer norm over the last axis, for blocks that work channels-last ([B, H, W, C])."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MaskMultiply(nn.Module):
    """A copy of a CNN that emulates sparse convolution by multiplication with the mask.

    Args:
        network: any CNN of convolutions, pools, batch norms and channel layer norms; it is copied.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.mask = _Mask()
        self.network = _convert(copy.deepcopy(network), self.mask)

    def forward(self, images: Tensor, active: Tensor):
        """Run on images [B, C, H, W] with the visible patches `active` bool [B, Gh, Gw]; dense maps, zero where hidden."""
        self.mask.active = active
        return self.network(images * self.mask.at(images))


def _convert(module: nn.Module, mask: _Mask) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
            setattr(module, name, _Masked(child, mask))
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _Gathered(child, mask))
        elif isinstance(child, nn.LayerNorm):
            first = type(child).__name__ in {"LayerNorm2d", "LayerNormExp2d"}
            setattr(module, name, (_Gathered if first else _GatheredLast)(child, mask))
        elif type(child).__name__ in {"Mlp", "GlobalResponseNormMlp"} and any(isinstance(m, nn.Linear) for m in child.modules()):
            # Linear layers act per position; their bias would fill hidden positions, and the next masked layer must not see it.
            setattr(module, name, _MaskedLast(_convert(child, mask), mask))
        else:
            _convert(child, mask)
    return module


class _MaskedLast(nn.Module):
    """A channels-last layer whose output [B, H, W, C] is multiplied by the mask."""

    def __init__(self, layer: nn.Module, mask: _Mask) -> None:
        super().__init__()
        self.layer, self.mask = layer, mask

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y * self.mask.at(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
