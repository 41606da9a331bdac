"""Peak memory of the encoder's training step on a GPU above parameters, gradients and optimizer state: `torch.cuda.max_memory_allocated`.

On the CPU, to try the bench: the bytes that autograd keeps for the backward pass.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import torch
from mwm.bench.encoders import DENSE, MASKED, OURS, EncoderSides
from mwm.bench.gpu_encoder import ENCODERS
from mwm.bench.gpu_timing import without_search
from mwm.bench.harness import Case, Match, Reading
from mwm.bench.settings import Settings
from torch import Tensor

_STEPS = 2


def reading(side: str, name: str, hidden: float, device: str, **sizes: int) -> Reading:
    """Builds a side alone, runs steps, reads MiB."""

    def read() -> float:
        sides = EncoderSides(name, hidden, bf16=True, device=device, **sizes)
        network = sides.network(side)
        for p in network.parameters():
            p.grad = torch.zeros_like(p)
        step = sides.step(side)
        return _kept(sides.maps(side)) if device == "cpu" else _peak(step)

    return read


def _peak(step: Callable[[], object]) -> float:
    step()  # with cudnn.benchmark the first one tries algorithms, some of which take gigabytes
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(_STEPS):
        step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _kept(forward: Callable[[], list[Tensor]]) -> float:
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        maps = forward()
    del maps
    return sum(kept.values()) / 2**20


def prepare(name: str, rivals: tuple[str, ...], hidden: float, device: str, **sizes: int) -> Match:
    """The sides are compared on two images; each is then built and run alone."""
    small = EncoderSides(name, hidden, bf16=True, device=device, **{**sizes, "batch": 2})
    with without_search():
        checks = {rival: small.check(rival) for rival in rivals}
    readings = {side: reading(side, name, hidden, device, **sizes) for side in (OURS, *rivals)}
    return Match(readings[OURS], {rival: readings[rival] for rival in rivals}, checks, unit="MiB", score_is="ours / rival", visible=small.share, warmup=0,
                 notes={"": "bytes kept for backward" if device == "cpu" else f"peak of {_STEPS} steps minus what was allocated before the first"})


def cases(settings: Settings, device: str) -> list[Case]:
    """Both encoders, bfloat16."""
    if settings.smoke:
        return [Case("gpu memory", "smoke: resnet18", partial(prepare, "resnet18", (DENSE,), 0.5, device, batch=2, size=64), 1)]
    return [Case("gpu memory", f"{name}, B = {settings.batch or 128}, {100 * hidden:g} % hidden",
                 partial(prepare, name, (DENSE, MASKED), hidden, device, batch=settings.batch or 128), 1)
            for name in settings.encoder or ENCODERS for hidden in settings.hidden or (0.6,)]
