"""The sparsified ResNet-50 against mask-multiply (do they agree?) and against the dense network (what is gained?)."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import Tensor
from tqdm import tqdm

import mwm

ENCODER = "resnet50"


@dataclass(frozen=True)
class Race:
    """What was measured.

    Attributes:
        difference: largest difference of any value of any map from mask-multiply, over the largest value of that map.
        seconds: median seconds of one training step (forward and backward), by side.
        ratios: median over interleaved pairs of (rival's time / ours), by rival.
        pairs: number of pairs.
        images, size, hidden: what the step ran on: number of images, their edge in pixels, share of hidden patches.
        threads: CPU threads of torch.
    """

    difference: float
    seconds: dict[str, float]
    ratios: dict[str, float]
    pairs: int
    images: int
    size: int
    hidden: float
    threads: int


OURS, DENSE, MASKED = "packed tiles (mwm)", "dense", "mask-multiply"


def run_race(images: Tensor, active: Tensor, *, budget: float = 22.0, seed: int = 0) -> Race:
    """Compare three ways to run the same ResNet-50 on the same visible patches.

    Args:
        images: [B, C, H, W], float32
        active: bool, True = visible. [B, Gh, Gw]
        budget: seconds that the timed pairs may take; at least three pairs are run, at most nine.
        seed: of the random weights.
    """
    from mwm.bench.mask_multiply import MaskMultiply

    torch.manual_seed(seed)
    dense = timm.create_model(ENCODER, features_only=True, in_chans=images.shape[1]).train()
    ours = mwm.sparsify(copy.deepcopy(dense)).to(memory_format=torch.channels_last)
    masked = MaskMultiply(dense).to(memory_format=torch.channels_last)
    dense = dense.to(memory_format=torch.channels_last)
    images = ((images - images.mean()) / images.std()).contiguous(memory_format=torch.channels_last)
    counts = active.flatten(1).sum(1)
    visible = int(counts[0]) if bool((counts == counts[0]).all()) else None

    sides: dict[str, Callable[[], list[Tensor]]] = {
        OURS: lambda: [m.unpack() for m in ours(mwm.pack(images, active, visible=visible))],
        DENSE: lambda: dense(images),
        MASKED: lambda: masked(images, active),
    }
    with torch.no_grad():
        weights = [torch.randn_like(m) / m[0].numel() ** 0.5 for m in sides[MASKED]()]
    step = {name: _step(maps, weights) for name, maps in sides.items()}
    maps_ours, maps_masked = step[OURS](), step[MASKED]()
    difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(maps_ours, maps_masked, strict=True))
    step[DENSE]()  # the rivals' first call allocates and compiles kernels, as ours did above
    times: dict[str, list[float]] = {name: [] for name in step}
    start = time.perf_counter()
    with tqdm(total=9, desc="timing", unit="round", leave=False, dynamic_ncols=True) as bar:
        while len(times[OURS]) < 9 and (len(times[OURS]) < 3 or time.perf_counter() - start < budget):
            for name, one in step.items():
                began = time.perf_counter()
                one()
                times[name].append(time.perf_counter() - began)
            bar.update()
    ratios = {name: statistics.median(t / m for t, m in zip(times[name], times[OURS], strict=True)) for name in (DENSE, MASKED)}
    return Race(difference, {name: statistics.median(t) for name, t in times.items()}, ratios, len(times[OURS]),
                len(images), images.shape[-1], 1 - float(active.float().mean()), torch.get_num_threads())


def _step(maps: Callable[[], list[Tensor]], weights: list[Tensor]) -> Callable[[], list[Tensor]]:
    def step() -> list[Tensor]:
        found = maps()
        sum((m * w).sum() for m, w in zip(found, weights, strict=True)).backward()
        return [m.detach() for m in found]

    return step
