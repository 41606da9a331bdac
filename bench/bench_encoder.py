"""A whole encoder, forward and backward: packed tiles against the dense network and against mask-multiply.

Timed from dense images to all maps unpacked, plan, pack and unpack included; gradients accumulate into `.grad`, as in training.
"""

from __future__ import annotations

from functools import partial

from mwm.bench.encoders import COMPILED, DENSE, MASKED, MASKED_LAST, OURS, EncoderSides, random_active
from mwm.bench.harness import Case, Match, timed
from mwm.bench.settings import Settings

__all__ = ["cases", "prepare", "random_active"]


def prepare(name: str, hidden: float, rivals: tuple[str, ...], *, batch: int = 8, bf16: bool = False, compiler: str = "inductor", **sizes: int) -> Match:
    """Build the sides, compare them, and make a training step of each."""
    sides = EncoderSides(name, hidden, batch=batch, bf16=bf16, compiler=compiler, **sizes)
    return Match(timed(sides.step(OURS)), {rival: timed(sides.step(rival)) for rival in rivals}, {rival: sides.check(rival) for rival in rivals},
                 visible=sides.share, warmup=1)


def case(name: str, hidden: float, rivals: tuple[str, ...], *, bf16: bool = False, pairs: int = 5, extra: bool = False, **options: object) -> Case:
    """A case with the name that the bars know."""
    words = f"{name}, {100 * hidden:g} % hidden{', bfloat16' if bf16 else ''}"
    return Case("encoder", words, partial(prepare, name, hidden, rivals, bf16=bf16, **options), pairs, extra)


def cases(settings: Settings) -> list[Case]:
    """ResNet-50 and ConvNeXt-T over the visible share; mask-multiply and torch.compile where a bar or a reader asks for them."""
    compiled = (COMPILED,) if settings.compiled else ()
    if settings.smoke:
        small = dict(batch=1, size=64, compiler="eager")
        return [Case("encoder", f"smoke: resnet18{', bfloat16' if bf16 else ''}", partial(prepare, "resnet18", 0.5, rivals, bf16=bf16, **small), 1)
                for bf16, rivals in ((False, (DENSE, *compiled, MASKED, MASKED_LAST)), (True, (DENSE,)))]
    batch = dict(batch=settings.batch or 8)
    if settings.encoder or settings.hidden:
        return [case(name, hidden, (DENSE, *compiled, MASKED, MASKED_LAST), bf16=settings.bf16, **batch)
                for name in settings.encoder or ["resnet50"] for hidden in settings.hidden or [0.4, 0.6, 0.75]]
    return [
        case("resnet50", 0.6, (DENSE, MASKED, MASKED_LAST), **batch),
        *(case("resnet50", hidden, (DENSE, MASKED), **batch) for hidden in (0.4, 0.75)),
        case("resnet50", 0.6, (DENSE, MASKED), bf16=True, **batch),
        case("convnext_tiny", 0.6, (DENSE, MASKED), **batch),
        *(case("resnet50", hidden, (DENSE,), pairs=3, extra=True, **batch) for hidden in (0.0, 0.2)),
        *(case("convnext_tiny", hidden, (DENSE,), pairs=3, extra=True, **batch) for hidden in (0.0, 0.2, 0.4, 0.75)),
        *(case(name, 0.6, compiled, bf16=bf16, pairs=3, extra=True, **batch)
          for name, bf16 in (("resnet50", False), ("resnet50", True), ("convnext_tiny", False)) if compiled),
    ]
