"""What has to be reached on a GPU, as data: bars for bfloat16, 60 % hidden unless the case says otherwise, 128 images, on an H200."""

from __future__ import annotations

from mwm.bench.bars import DENSE, Bar

MASKED = "mask-multiply NCHW"
SHIPPED, SHIPPED_BF16 = "authors' step as shipped (fp32, TF32 convolutions)", "authors' step, bfloat16 autocast"

BARS = [
    Bar("gpu layers", "*: 1x1 *, 60 % hidden, graph", DENSE, ">=", 2.2, "1x1 layers against dense"),
    Bar("gpu layers", "resnet50: 3x3 * t[842], forward, 60 % hidden, graph", DENSE, ">=", 1.8, "3x3 at t = 8, 4, 2, forward, against cuDNN channels-last"),
    Bar("gpu layers", "resnet50: 3x3 * t[842], forward + backward, 60 % hidden, graph", DENSE, ">=", 1.6, "3x3 at t = 8, 4, 2, forward + backward"),
    Bar("gpu depthwise", "convnext_tiny: *, 60 % hidden, graph", DENSE, ">=", 3.0, "depthwise 7x7 against cuDNN"),
    Bar("gpu encoder", "*, 60 % hidden, graph", DENSE, ">=", 2.0, "ResNet-50 and ConvNeXt-S encoder step against dense, graphed"),
    Bar("gpu encoder", "*, 60 % hidden, eager", DENSE, ">=", 1.7, "ResNet-50 and ConvNeXt-S encoder step against dense, eager"),
    Bar("gpu encoder", "*, 40 % hidden, graph", DENSE, ">=", 1.5, "the same at 40 % hidden, graphed"),
    Bar("gpu encoder", "*, 25 % hidden, graph", DENSE, ">=", 1.0, "break-even at a visible share of 75 % or more"),
    Bar("gpu encoder", "*, 60 % hidden, eager", MASKED, ">=", 3.0, "encoder step against mask-multiply"),
    Bar("gpu step", "ours TF32", SHIPPED, ">=", 3.0, "whole pre-training step against the authors'"),
    Bar("gpu step", "bfloat16 on both sides", SHIPPED_BF16, ">=", 1.8, "whole pre-training step, bfloat16 on both sides"),
    Bar("gpu memory", "*, 60 % hidden", DENSE, "<=", 0.5, "peak memory of the encoder step above parameters, gradients, optimizer state; ours / dense"),
    Bar("gpu masks", "sampling, 4096 images of 7x7,*", "the bar of 20 µs", ">=", 1.0, "masks of 4096 images, 7x7 patches, one launch"),
]


def bar_of(bench: str, case: str, rival: str) -> Bar | None:
    """The bar that judges a row, if there is one."""
    return next((bar for bar in BARS if bar.covers(bench, case, rival)), None)
