"""torchvision's layers that must know their image, or that ask whether their input is a tensor."""

from __future__ import annotations

from typing import Any

from torchvision.models.densenet import _DenseLayer
from torchvision.ops import StochasticDepth

from .layers import drop_branch
from .packed import Packed


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


SWAPS: dict[type, type] = {StochasticDepth: PackedStochasticDepth, _DenseLayer: PackedDenseLayer}
