"""The whole pre-training step on a GPU, masks included, against the authors' step with the same weights: as shipped, and bfloat16 on both sides.

As shipped means float32 with torch's defaults, under which cuDNN's convolutions round to TF32. Ours does so in the row "ours TF32" only, where
`torch.backends.cuda.matmul` asks for it; "ours fp32" is IEEE float32 in the encoder.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from functools import partial

import torch
from mwm.bench.bench_step import HIGH, StepSides
from mwm.bench.gpu_bars import SHIPPED, SHIPPED_BF16
from mwm.bench.gpu_timing import event_timed, graph_timed, without_search
from mwm.bench.harness import Case, Match, Step
from mwm.bench.settings import Settings
from torch import Tensor

import mwm
from mwm.ops import TilePlan
from mwm.train.captured import WARM, CapturedGradients

FIXED, PER_COUNT = "masks of a fixed count", "a graph per count, masks of two shares"


def _graph(words: str) -> str:
    return words.rpartition("graphed, ")[2] if "graphed" in words else ""


def _with_tf32(step: Step) -> Step:
    def run() -> None:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            step()
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    return run


def _fixed_count(sides: StepSides, device: str) -> Step:
    """Our step in bfloat16 with masks of a fixed count, drawn on the device: nothing in it waits, so that it can be captured."""
    policy = mwm.create_policy("region", high=HIGH, overall=0.6)
    regions, ids, visible = sides.regions.to(device), sides.ids.to(device), policy.visible(sides.grid)

    def step() -> None:
        active = policy(regions, grid=sides.grid, seed=0, ids=ids, epoch=1)
        with torch.autocast(device, torch.bfloat16):
            loss = sides.ours(sides.images_last, active, visible=visible)
        loss.backward()

    return step


def _graph_per_count(sides: StepSides, device: str) -> Step:
    """Our step in bfloat16 as `mwm pretrain --cuda-graph` runs it, with two shares: masks of eight epochs in turn, drawn on the host, each count captured beforehand."""
    if device == "cpu":
        return sides.our_step(bf16=True)

    def gradients(images: Tensor, plan: TilePlan, others: Sequence[Tensor]) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            loss = sides.ours(images, plan)
        loss.backward()
        return loss.detach()

    replayed, calls = CapturedGradients(gradients, list(sides.ours.parameters()), sides.ours.patch_size, torch.device(device)), itertools.count()

    def step() -> None:
        active = sides.policy(sides.regions, grid=sides.grid, seed=0, ids=sides.ids, epoch=next(calls) % 8)
        replayed(sides.images_last, active, None, [])

    for _ in range(WARM + 16):
        step()
    return step


@functools.lru_cache(maxsize=1)
def _sides(name: str, device: str, sizes: tuple[tuple[str, int], ...]) -> StepSides:
    """One pair of models for all cases: to initialise them takes longer than to time them."""
    return StepSides(name, device=device, **dict(sizes))


def prepare(name: str, device: str, *, ours_bf16: bool, authors_bf16: bool, tf32: bool = False, graph: str = "", **sizes: int) -> Match:
    """Both steps, and whether they agree on two of the images."""
    sides = _sides(name, device, tuple(sorted(sizes.items())))
    with without_search():
        check = sides.check(ours_bf16=ours_bf16, authors_bf16=authors_bf16, loose=device != "cpu")
    rival = SHIPPED_BF16 if authors_bf16 else SHIPPED
    step = _fixed_count(sides, device) if graph == FIXED else _graph_per_count(sides, device) if graph else sides.our_step(bf16=ours_bf16)
    mine = graph_timed(step, device) if graph == FIXED else event_timed(_with_tf32(step) if tf32 else step, device)
    return Match(mine, {rival: event_timed(sides.authors_step(bf16=authors_bf16), device)}, {rival: check},
                 visible=0.4, warmup=1)


def cases(settings: Settings, device: str) -> list[Case]:
    """float32, bfloat16 against the authors' as shipped, bfloat16 on both sides."""
    kinds = [("ours TF32", False, False), ("bfloat16 on both sides", True, True), ("ours fp32", False, False), ("ours bfloat16", True, False),
             (f"bfloat16, ours graphed, {FIXED}", True, True), (f"bfloat16, ours graphed, {PER_COUNT}", True, True)]
    if settings.smoke:
        return [Case("gpu step", f"smoke: {words}", partial(prepare, "resnet18", device, ours_bf16=mine, authors_bf16=theirs, tf32="TF32" in words,
                                                                 graph=_graph(words), width=32, batch=2, size=64), 1)
                for words, mine, theirs in (kinds[0], *kinds[-2:])]
    return [Case("gpu step", words, partial(prepare, "resnet50", device, ours_bf16=mine, authors_bf16=theirs, tf32="TF32" in words,
                                            graph=_graph(words), batch=settings.batch or 64), 5)
            for words, mine, theirs in kinds]
