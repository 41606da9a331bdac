"""Layers that must know more than their input shows: subclasses that a module is turned into, keeping its parameters and hooks."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F

from .packed import Packed
from .pointwise import pointwise
from .randomness import LAYER, drop_channels


class PackedDropout2d(nn.Dropout2d):
    """nn.Dropout2d that drops channels of an image, not of a tile."""

    def forward(self, input: Any) -> Any:
        """Dense maps as before; packed tiles by image."""
        if not isinstance(input, Packed) or not self.training or self.p == 0.0:
            return super().forward(input)
        return drop_channels(input, self.p, self.__dict__.get(LAYER))


class PackedHardswish(nn.Hardswish):
    """nn.Hardswish; torch.compile does not see its in-place form on packed tiles."""

    def forward(self, input: Any) -> Any:
        """Per position."""
        return pointwise(F.hardswish, (input,), {"inplace": self.inplace}) if isinstance(input, Packed) else super().forward(input)


class PackedHardsigmoid(nn.Hardsigmoid):
    """nn.Hardsigmoid; torch.compile does not see its in-place form on packed tiles."""

    def forward(self, input: Any) -> Any:
        """Per position."""
        return pointwise(F.hardsigmoid, (input,), {"inplace": self.inplace}) if isinstance(input, Packed) else super().forward(input)


def torch_layers() -> dict[type, type]:
    """Swaps for torch.nn."""
    return {nn.Dropout2d: PackedDropout2d, nn.Hardswish: PackedHardswish, nn.Hardsigmoid: PackedHardsigmoid}


def timm_layers() -> dict[type, type]:
    """Swaps for timm, imported only where a net has timm's layers."""
    from .timm_layers import SWAPS

    return SWAPS


def torchvision_layers() -> dict[type, type]:
    """Swaps for torchvision, imported only where a net has torchvision's layers."""
    from .torchvision_layers import SWAPS

    return SWAPS
