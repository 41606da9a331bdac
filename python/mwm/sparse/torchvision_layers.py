"""torchvision's layers that must know their image, or that ask whether their input is a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torchvision.models.densenet import _DenseLayer
from torchvision.models.segmentation.deeplabv3 import ASPPPooling
from torchvision.ops import StochasticDepth

from .operands import image_rows
from .packed import Packed
from .randomness import drop_branch


class PackedStochasticDepth(StochasticDepth):
    """Stochastic depth by image."""

    def forward(self, input: Any) -> Any:
        """Dense maps as before; packed tiles by image."""
        if not isinstance(input, Packed):
            return super().forward(input)
        if not self.training or self.p == 0.0:
            return input
        return drop_branch(self, input, self.p, per_batch=self.mode == "batch")


class PackedDenseLayer(_DenseLayer):
    """Dense layer that takes one packed map like one tensor."""

    def forward(self, input: Any) -> Any:
        """One map, or the list of the maps so far."""
        return super().forward([input] if isinstance(input, Packed) else input)


class PackedASPPPooling(ASPPPooling):
    """Image-level features of DeepLab by image."""

    def forward(self, x: Any) -> Any:
        """Dense maps as before; of packed tiles the mean over the visible positions, at each of them."""
        if not isinstance(x, Packed):
            return super().forward(x)
        rows = x
        for layer in self:
            rows = layer(rows)
        # One position enlarged to a map is the same everywhere, whatever the interpolation.
        edge = x.tiles.shape[-1]
        return Packed(image_rows(rows, x.plan).expand(-1, -1, edge, edge).contiguous(memory_format=torch.channels_last), x.plan)


SWAPS: dict[type, type] = {StochasticDepth: PackedStochasticDepth, _DenseLayer: PackedDenseLayer, ASPPPooling: PackedASPPPooling}
