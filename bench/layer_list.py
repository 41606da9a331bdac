"""Which layers the bench of single layers runs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Layer:
    """One layer at tile edge `edge`.

    Attributes:
        net: where it occurs.
        name: for people: kernel, channels, tile edge at the input.
        channels, filters: of input and output.
        kind: "conv", "max-pool", "batch norm", "layer norm" (over channels of [B, H, W, C]).
        needs_gradient: False where the input is the image.
    """

    net: str
    name: str
    channels: int
    filters: int
    kernel: int
    edge: int
    stride: int = 1
    groups: int = 1
    kind: str = "conv"
    needs_gradient: bool = True

    @property
    def padding(self) -> int:
        """As the networks pad: none for patchifying, else half the kernel."""
        return 0 if self.kernel == self.stride else (self.kernel - 1) // 2

    @property
    def permuted(self) -> bool:
        """Whether the module wants [B, H, W, C]."""
        return self.kind == "layer norm"

    def module(self) -> nn.Module:
        """The module as a network holds it."""
        if self.kind == "max-pool":
            return nn.MaxPool2d(self.kernel, self.stride, self.padding)
        if self.kind == "batch norm":
            return nn.BatchNorm2d(self.channels)
        if self.kind == "layer norm":
            return nn.LayerNorm(self.channels, eps=1e-6)
        return nn.Conv2d(self.channels, self.filters, self.kernel, self.stride, self.padding, groups=self.groups, bias=self.net == "convnext_tiny")


def _norm(net: str, kind: str, channels: int, edge: int) -> Layer:
    return Layer(net, f"{kind} {channels} t{edge}", channels, channels, 1, edge, kind=kind)


R, C, OTHERS = "resnet50", "convnext_tiny", "other nets"

LAYERS = [
    Layer(R, "stem 7x7/2 3-64 t32", 3, 64, 7, 32, 2, needs_gradient=False),
    Layer(R, "max-pool 3x3/2 64 t16", 64, 64, 3, 16, 2, kind="max-pool"),
    Layer(R, "1x1 64-256 t8", 64, 256, 1, 8),
    Layer(R, "1x1 256-64 t8", 256, 64, 1, 8),
    Layer(R, "3x3 64 t8", 64, 64, 3, 8),
    Layer(R, "3x3/2 128 t8", 128, 128, 3, 8, 2),
    Layer(R, "1x1/2 256-512 t8", 256, 512, 1, 8, 2),
    Layer(R, "1x1 128-512 t4", 128, 512, 1, 4),
    Layer(R, "3x3 128 t4", 128, 128, 3, 4),
    Layer(R, "3x3/2 256 t4", 256, 256, 3, 4, 2),
    Layer(R, "1x1/2 512-1024 t4", 512, 1024, 1, 4, 2),
    Layer(R, "1x1 256-1024 t2", 256, 1024, 1, 2),
    Layer(R, "3x3 256 t2", 256, 256, 3, 2),
    Layer(R, "3x3/2 512 t2", 512, 512, 3, 2, 2),
    Layer(R, "1x1/2 1024-2048 t2", 1024, 2048, 1, 2, 2),
    Layer(R, "1x1 2048-512 t1", 2048, 512, 1, 1),
    Layer(R, "3x3 512 t1", 512, 512, 3, 1),
    *(_norm(R, "batch norm", channels, edge) for channels, edge in ((64, 16), (256, 8), (512, 4), (1024, 2), (2048, 1))),
    Layer(C, "patchify 4x4 3-96 t32", 3, 96, 4, 32, 4, needs_gradient=False),
    Layer(C, "depthwise 7x7 96 t8", 96, 96, 7, 8, groups=96),
    Layer(C, "depthwise 7x7 192 t4", 192, 192, 7, 4, groups=192),
    Layer(C, "depthwise 7x7 384 t2", 384, 384, 7, 2, groups=384),
    Layer(C, "depthwise 7x7 768 t1", 768, 768, 7, 1, groups=768),
    Layer(C, "1x1 96-384 t8", 96, 384, 1, 8),
    Layer(C, "1x1 768-3072 t1", 768, 3072, 1, 1),
    Layer(C, "patchify 2x2 96-192 t8", 96, 192, 2, 8, 2),
    *(_norm(C, "layer norm", channels, edge) for channels, edge in ((96, 8), (192, 4), (384, 2), (768, 1))),
    Layer(OTHERS, "depthwise 3x3/2 144 t8", 144, 144, 3, 8, 2, groups=144),
    Layer(OTHERS, "depthwise 5x5 240 t4", 240, 240, 5, 4, groups=240),
    Layer(OTHERS, "grouped 3x3 128/32 t8", 128, 128, 3, 8, groups=32),
    Layer(OTHERS, "grouped 3x3 512/32 t2", 512, 512, 3, 2, groups=32),
]

SMOKE = [
    Layer(R, "3x3 8 t2", 8, 8, 3, 2), Layer(R, "1x1 8-16 t2", 8, 16, 1, 2), Layer(C, "depthwise 7x7 8 t2", 8, 8, 7, 2, groups=8),
    Layer(R, "max-pool 3x3/2 8 t4", 8, 8, 3, 4, 2, kind="max-pool"), _norm(R, "batch norm", 8, 2), _norm(C, "layer norm", 8, 2),
]
