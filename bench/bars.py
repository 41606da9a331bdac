"""What has to be reached, as data: one line per promise, matched to measured rows by bench, case and rival."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Bar:
    """One promise.

    Attributes:
        bench, case, rival: patterns (`*` matches anything) of the rows that it speaks of; the worst of them counts.
        sign: ">=" or "<=".
        value: the bar, in the unit of the row's score.
        text: the promise in words.
        aim: what is hoped for beyond, or empty.
    """

    bench: str
    case: str
    rival: str
    sign: str
    value: float
    text: str
    aim: str = ""

    def covers(self, bench: str, case: str, rival: str) -> bool:
        """Whether a row with these names is judged by this bar."""
        return bench == self.bench and fnmatchcase(case, self.case) and fnmatchcase(rival, self.rival)

    def met(self, score: float) -> bool:
        """Whether a score reaches the bar; NaN does not."""
        return score >= self.value if self.sign == ">=" else score <= self.value

    def words(self) -> str:
        """`≥ 2.45`"""
        return f"{'≥' if self.sign == '>=' else '≤'} {self.value:g}"


DENSE, SHIPPED = "dense channels-last", "authors' step as shipped (fp32)"

BARS = [
    Bar("encoder", "resnet50, 40 % hidden", DENSE, ">=", 1.69, "ResNet-50 encoder, forward + backward, 40 % hidden, against dense channels-last"),
    Bar("encoder", "resnet50, 60 % hidden", DENSE, ">=", 2.45, "ResNet-50 encoder, 60 % hidden"),
    Bar("encoder", "resnet50, 75 % hidden", DENSE, ">=", 4.08, "ResNet-50 encoder, 75 % hidden"),
    Bar("encoder", "resnet50, 60 % hidden", "mask-multiply NCHW", ">=", 4.4, "ResNet-50 encoder, 60 % hidden, against mask-multiply as SparK ships it", "5"),
    Bar("encoder", "resnet50, 60 % hidden, bfloat16", DENSE, ">=", 2.2, "ResNet-50 encoder, 60 % hidden, bfloat16 autocast on both sides"),
    Bar("encoder", "convnext_tiny, 60 % hidden", DENSE, ">=", 2.45, "ConvNeXt-T encoder, forward + backward, 60 % hidden, against dense channels-last"),
    Bar("layers", "resnet50: *", DENSE, ">=", 1.0, "no layer of ResNet-50 slower than dense, up to 85 % visible"),
    Bar("layers", "convnext_tiny: *", DENSE, ">=", 1.0, "no layer of ConvNeXt-T slower than dense, up to 85 % visible"),
    Bar("step", "ours fp32", SHIPPED, ">=", 1.9, "whole pre-training step (ResNet-50, decoder 768), against the authors' step"),
    Bar("step", "ours bfloat16", SHIPPED, ">=", 3.5, "whole pre-training step, ours in bfloat16, the authors' as shipped"),
    Bar("sampler", "1024 images of 7x7", "authors' loop", ">=", 200, "masks of 1024 images, 7x7 patches, against the authors' loop", "500"),
    Bar("sampler", "1024 images of 14x14", "authors' loop", ">=", 60, "masks of 1024 images, 14x14 patches, against the authors' loop", "500"),
    Bar("coverage", "[[]1024, 224, 224]*", "memory bandwidth", ">=", 60, "region_coverage from [1024, 224, 224], % of memory bandwidth"),
    Bar("memory", "resnet50, B = 32, 60 % hidden", DENSE, "<=", 0.5, "peak memory of the encoder step above parameters, gradients, optimizer state; ours / dense"),
    Bar("threads", "resnet50, ours", "1 thread", ">=", 1.8, "encoder step, time at 1 thread / time at 2"),
    Bar("localize", "faithful", "the authors' procedure", ">=", 10, "bottleneck, faithful, fp32, one image, ViT-B/16 at 224, block 7, against the authors' M2IB"),
    Bar("localize", "fast", "the authors' procedure", ">=", 50, "bottleneck, fast, fp32, one image, against the authors' M2IB"),
    Bar("localize", "fa*, batched", "the same, one by one", ">=", 0.95, "bottleneck, batched, time per image one by one / batched"),
    Bar("plan", "128 images", "encoder step of as many images", "<=", 1.0, "plan + pack for 128 images, % of the encoder step"),
]


def bar_of(bench: str, case: str, rival: str) -> Bar | None:
    """The bar that judges a row, if there is one."""
    return next((bar for bar in BARS if bar.covers(bench, case, rival)), None)
