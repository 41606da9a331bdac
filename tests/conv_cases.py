"""Convolutions that the tests of `tile_conv` share, and their oracle: dense conv2d on the unpacked map."""

from __future__ import annotations

from dataclasses import dataclass

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from mwm import ops
from mwm.ops import reference

MASKS = harness.masks()


@dataclass(frozen=True)
class Conv:
    """One layer on tiles of edge `edge`; padding as `tile_conv` takes it."""

    channels: int
    filters: int
    kernel: tuple[int, int]
    edge: int
    stride: int = 1
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    bias: bool = True

    def inputs(self, plan: ops.TilePlan, exact: bool = False) -> list[Tensor | None]:
        """x, weight and bias in float64; small integers where `exact`."""
        draw = harness.integers if exact else harness.normals
        generator = torch.Generator().manual_seed(self.channels + self.edge)
        shapes = [
            (plan.num_tiles, self.channels, self.edge, self.edge),
            (self.filters, self.channels // self.groups, *self.kernel),
            (self.filters,),
        ]
        drawn = [draw(shape, generator) for shape in shapes]
        return drawn if self.bias else [*drawn[:2], None]

    def run(self, plan: ops.TilePlan, backend: str | None = None):
        """The op as a function of x, weight and bias."""
        return lambda x, weight, bias: ops.tile_conv(
            x, weight, bias, plan, stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups, backend=backend
        )

    def oracle(self, plan: ops.TilePlan):
        """Unpack, convolve densely, pack."""

        def function(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            dense, padding = reference.unpack_tiles(x, plan.active), self.padding
            if isinstance(padding, tuple) and len(padding) == 4:
                dense, padding = F.pad(dense, padding), 0
            if dense.shape[0] == 0:
                return (x.sum() + weight.sum()) * x.new_zeros((0, self.filters, self.edge // self.stride, self.edge // self.stride))
            out = F.conv2d(dense, weight, bias, self.stride, padding, self.dilation, self.groups)
            return reference.pack_tiles(out, plan.active)

        return function


CONVS = {
    "3x3": Conv(16, 40, (3, 3), 4, padding=1),
    "3x3 t1": Conv(70, 130, (3, 3), 1, padding=1, bias=False),
    "3x3 t2": Conv(9, 17, (3, 3), 2, padding=1),
    "3x3 t7": Conv(5, 6, (3, 3), 7, padding=1),
    "3x3 t3 stride 3": Conv(5, 6, (3, 3), 3, stride=3, padding=0),
    "3x3 stride 2": Conv(20, 24, (3, 3), 4, stride=2, padding=1),
    "3x3 stride 2 same": Conv(6, 7, (3, 3), 4, stride=2, padding=(0, 1, 0, 1)),
    "1x1 stride 2": Conv(32, 48, (1, 1), 2, stride=2, bias=False),
    "2x2 patchify": Conv(12, 20, (2, 2), 2, stride=2),
    "4x4 patchify": Conv(3, 16, (4, 4), 8, stride=4),
    "stem 7x7": Conv(3, 64, (7, 7), 8, stride=2, padding=3, bias=False),
    "stem 7x7 one channel": Conv(1, 20, (7, 7), 8, stride=2, padding=3),
    "7x7 t1": Conv(4, 5, (7, 7), 1, padding=3),
    "5x5 t1": Conv(6, 16, (5, 5), 1, padding=2),
    "1x11 band": Conv(6, 8, (1, 11), 2, padding=(0, 5)),
    "11x1 band": Conv(6, 8, (11, 1), 1, padding=(0, 0, 5, 5)),
    "3x3 dilated": Conv(6, 8, (3, 3), 4, padding=2, dilation=2),
    "3x3 dilated unevenly": Conv(6, 8, (3, 3), 2, padding=(1, 3), dilation=(1, 3)),
    "even kernel": Conv(6, 8, (4, 2), 4, padding=(0, 1, 1, 2)),
    "groups of 1 to 2": Conv(8, 16, (3, 3), 2, padding=1, groups=8),
    "groups of 4": Conv(32, 32, (3, 3), 4, padding=1, groups=8),
    "groups of 24": Conv(48, 48, (3, 3), 2, stride=2, padding=1, groups=2, bias=False),
    "groups of 3 to 5": Conv(9, 15, (3, 3), 2, padding=1, groups=3),
    "1x1": Conv(130, 70, (1, 1), 2),
}
DEPTHWISE = {
    f"{name} {channels}": Conv(channels, channels, kernel, edge, stride, padding, dilation, channels, bias)
    for channels in (3, 37, 96)
    for name, kernel, edge, stride, padding, dilation, bias in [
        ("7x7 t8", (7, 7), 8, 1, 3, 1, True),
        ("7x7 t4", (7, 7), 4, 1, 3, 1, True),
        ("7x7 t2", (7, 7), 2, 1, 3, 1, True),
        ("7x7 t1", (7, 7), 1, 1, 3, 1, True),
        ("5x5 stride 2", (5, 5), 4, 2, 2, 1, False),
        ("3x3 stride 2", (3, 3), 8, 2, 1, 1, False),
        ("3x3 stride 2 same", (3, 3), 2, 2, (0, 1, 0, 1), 1, False),
        ("3x3 t7", (3, 3), 7, 1, 1, 1, True),
        ("3x3 t3 stride 3", (3, 3), 3, 3, 0, 1, True),
        ("3x3 dilated", (3, 3), 4, 1, 2, 2, True),
        ("1x11 band", (1, 11), 2, 1, (0, 5), 1, True),
        ("11x1 band", (11, 1), 1, 1, (5, 0), 1, True),
    ]
}
