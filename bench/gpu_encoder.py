"""A whole encoder on a GPU, forward and backward, bfloat16 autocast: graphed and eager, against dense, compiled dense, mask-multiply.

From dense images to all maps unpacked, plan, pack and unpack included; gradients accumulate into `.grad`, as in training. The graph is
captured once and replayed; a mask of a fixed count keeps every shape.
"""

from __future__ import annotations

from functools import partial

from mwm.bench.encoders import COMPILED, DENSE, MASKED, MASKED_LAST, OURS, EncoderSides
from mwm.bench.gpu_timing import event_timed, graph_timed, without_search
from mwm.bench.harness import Case, Match
from mwm.bench.settings import Settings

ENCODERS = ("resnet50", "convnext_small")


def prepare(name: str, hidden: float, rivals: tuple[str, ...], timing: str, device: str, *, batch: int, compiler: str = "inductor", **sizes: int) -> Match:
    """Compare the sides on two images, then make a training step of each; mask-multiply, which waits for the GPU, cannot be captured."""
    small = EncoderSides(name, hidden, batch=2, bf16=True, compiler=compiler, device=device, **sizes)
    with without_search():
        checks = {rival: small.check(rival) for rival in rivals}
    del small
    sides = EncoderSides(name, hidden, batch=batch, bf16=True, compiler=compiler, device=device, **sizes)
    read = graph_timed if timing == "graph" else event_timed
    return Match(read(sides.step(OURS), device), {rival: read(sides.step(rival), device) for rival in rivals}, checks, visible=sides.share, warmup=2)


def cases(settings: Settings, device: str) -> list[Case]:
    """Both encoders over the hidden shares, graphed; eager with all rivals at 60 %."""
    if settings.smoke:
        small = dict(batch=2, size=64, compiler="eager")
        return [Case("gpu encoder", f"smoke: resnet18, {timing}", partial(prepare, "resnet18", 0.5, rivals, timing, device, **small), 1)
                for timing, rivals in (("graph", (DENSE,)), ("eager", (DENSE, COMPILED, MASKED, MASKED_LAST)))]
    compiled = (COMPILED,) if settings.compiled else ()
    batch = dict(batch=settings.batch or 128)
    found = []
    for name in settings.encoder or ENCODERS:
        for hidden in settings.hidden or (0.6, 0.4, 0.25, 0.75):
            words = f"{name}, {100 * hidden:g} % hidden"
            found.append(Case("gpu encoder", f"{words}, graph", partial(prepare, name, hidden, (DENSE,), "graph", device, **batch), 7))
            if hidden == 0.6:
                found.append(Case("gpu encoder", f"{words}, eager", partial(prepare, name, hidden, (DENSE, MASKED, MASKED_LAST), "eager", device, **batch), 5))
                if compiled:
                    found.append(Case("gpu encoder", f"{words}, graph, compiled rival", partial(prepare, name, hidden, compiled, "graph", device, **batch),
                                      5, extra=True))
    return found
