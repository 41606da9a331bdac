"""The encoder's training step at one thread and at two, ours and dense: time at 1 / time at 2."""

from __future__ import annotations

import os
from functools import partial

import torch
from mwm.bench.encoders import DENSE, MAPS, OURS, EncoderSides
from mwm.bench.harness import Case, Check, Match, Reading, Step, timed, worst_difference
from mwm.bench.settings import Settings

RIVAL = "1 thread"


def at(threads: int, step: Step) -> Reading:
    """A reading with so many threads; the step before it lets the thread pool settle. The number is put back afterwards."""
    read = timed(step)

    def reading() -> float:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            step()
            return read()
        finally:
            torch.set_num_threads(before)

    return reading


def prepare(name: str, side: str, **sizes: int) -> Match:
    """One side's step at 2 threads and at 1. Torch's own layers sum in another order with another number of threads."""
    sides = EncoderSides(name, 0.6, **sizes)
    before, forward = torch.get_num_threads(), sides.maps(side)
    found = []
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            with torch.no_grad():
                found.append(forward())
    finally:
        torch.set_num_threads(before)
    check = Check(worst_difference(*found), MAPS)
    step = sides.step(side)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Match(at(2, step), {RIVAL: at(1, step)}, {RIVAL: check}, visible=sides.share, warmup=0,
                 notes={"": "" if usable > 1 else "only one core is usable here"})


def cases(settings: Settings) -> list[Case]:
    """Ours, judged, and dense, for comparison."""
    if settings.smoke:
        return [Case("threads", "smoke: resnet18, ours", partial(prepare, "resnet18", OURS, batch=1, size=64), 1)]
    return [Case("threads", "resnet50, ours", partial(prepare, "resnet50", OURS), 5), Case("threads", "resnet50, dense", partial(prepare, "resnet50", DENSE), 3, extra=True)]
