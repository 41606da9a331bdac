"""timm's layers that must know their image, or that ask whether their input is a tensor."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import CecaModule, CondConv2d, DropPath, EcaModule
from timm.layers.space_to_depth import SpaceToDepth
from timm.layers.split_attn import SplitAttn
from timm.models.densenet import DenseLayer
from timm.models.vgg import ConvMlp
from torch import Tensor
from torch.nn import functional as F

from .packed import Packed
from .randomness import drop_branch
from .strides import check_step
from .windows import on_dense_map


class PackedDropPath(DropPath):
    """DropPath by image."""

    def forward(self, x: Any) -> Any:
        """Dense maps as before; packed tiles by image."""
        if not isinstance(x, Packed):
            return super().forward(x)
        if not self.training or self.drop_prob == 0.0:
            return x
        return drop_branch(self, x, self.drop_prob, scale=self.scale_by_keep)


class PackedDenseLayer(DenseLayer):
    """DenseLayer that takes one packed map like one tensor."""

    def forward(self, x: Any) -> Any:
        """One map, or the list of the maps so far."""
        return super().forward([x] if isinstance(x, Packed) else x)


def _gate(module: EcaModule | CecaModule, x: Packed, conv: Any) -> Any:
    rows = x.mean((2, 3))  # [B, C]
    gate = module.gate(conv(rows[:, None]))
    return x * gate.reshape(*rows.shape, 1, 1)


class PackedEca(EcaModule):
    """Channel attention by image."""

    def forward(self, x: Any) -> Any:
        """Dense maps as before; packed tiles by image."""
        if not isinstance(x, Packed):
            return super().forward(x)

        def conv(rows: Tensor) -> Tensor:
            rows = self.conv(rows)
            return rows if self.conv2 is None else self.conv2(self.act(rows))

        return _gate(self, x, conv)


class PackedCeca(CecaModule):
    """Circular channel attention by image."""

    def forward(self, x: Any) -> Any:
        """Dense maps as before; packed tiles by image."""
        if not isinstance(x, Packed):
            return super().forward(x)
        return _gate(self, x, lambda rows: self.conv(F.pad(rows, (self.padding, self.padding), mode="circular")))


class PackedSplitAttn(SplitAttn):
    """Split attention by image."""

    def forward(self, x: Any) -> Any:
        """Dense maps as before; packed tiles by image."""
        if not isinstance(x, Packed):
            return super().forward(x)
        x = self.act0(self.drop(self.bn0(self.conv(x))))
        groups = torch.chunk(x, self.radix, 1)
        gap = groups[0]
        for group in groups[1:]:
            gap = gap + group
        gap = gap.mean((2, 3), keepdim=True)
        gate = self.rsoftmax(self.fc2(self.act1(self.bn1(self.fc1(gap)))))
        gates = gate.reshape(gap.shape[0], -1, 1, 1).chunk(self.radix, 1)
        out = groups[0] * gates[0]
        for group, weight in zip(groups[1:], gates[1:], strict=True):
            out = out + group * weight
        return out


class PackedSpaceToDepth(SpaceToDepth):
    """Squares that no tile border crosses, to channels."""

    def forward(self, x: Any) -> Any:
        """Dense maps as before; packed tiles tile by tile, which is the same."""
        if not isinstance(x, Packed):
            return super().forward(x)
        check_step("space to depth", x, self.bs)
        return Packed(super().forward(x.tiles).contiguous(memory_format=torch.channels_last), x.plan)


class PackedCondConv2d(CondConv2d):
    """Convolution with filters mixed for each image; on the dense map, zero where hidden."""

    def forward(self, x: Any, routing_weights: Tensor) -> Any:
        """Dense maps as before; packed tiles by image."""
        if not isinstance(x, Packed):
            return super().forward(x, routing_weights)
        check_step(F.conv2d, x, self.stride[0])
        return on_dense_map(F.conv2d, x, lambda dense: CondConv2d.forward(self, dense, routing_weights))


class PackedConvMlp(ConvMlp):
    """VGG's first linear layers as convolutions: they read the whole map, zero where hidden."""

    def forward(self, x: Any) -> Tensor:
        """Dense maps as before; packed tiles unpacked."""
        return super().forward(x.unpack() if isinstance(x, Packed) else x)


SWAPS: dict[type, type] = {
    DropPath: PackedDropPath,
    DenseLayer: PackedDenseLayer,
    EcaModule: PackedEca,
    CecaModule: PackedCeca,
    SplitAttn: PackedSplitAttn,
    SpaceToDepth: PackedSpaceToDepth,
    CondConv2d: PackedCondConv2d,
    ConvMlp: PackedConvMlp,
}
