"""The dense convolutions of the method, by the ops that are faster on a CPU."""

from __future__ import annotations

from torch import Tensor, nn

from mwm.ops import conv3x3, conv_transpose4x4
from mwm.sparse import Packed


class Conv3x3(nn.Conv2d):
    """nn.Conv2d with a 3x3 kernel and padding 1, on the CPU through `mwm.ops.conv3x3` where that is faster.

    [B, in_channels, H, W] -> [B, out_channels, H, W]
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor | Packed) -> Tensor | Packed:
        """Packed tiles go the way of every convolution."""
        return super().forward(x) if isinstance(x, Packed) else conv3x3(x, self.weight, self.bias)


class Doubling(nn.ConvTranspose2d):
    """nn.ConvTranspose2d with a 4x4 kernel, stride 2, padding 1.

    [B, in_channels, H, W] -> [B, out_channels, 2H, 2W]
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """As in the class's text."""
        return conv_transpose4x4(x, self.weight, self.bias)
