"""Readings on a GPU: eager steps by CUDA events, kernels alone by replays of a CUDA graph. On the CPU both are wall time, to try the benches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from mwm.bench.harness import Reading, Step, timed

_SHORTEST = 20.0  # ms of one timed stretch; shorter steps are repeated until they fill it
_MOST = 500  # repeats


@contextlib.contextmanager
def without_search() -> Iterator[None]:
    """Inside, cuDNN takes the algorithm that it expects to be the fastest: for checks on two images, whose shapes are never timed."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def event_timed(step: Step, device: str) -> Reading:
    """A reading of a step's time in milliseconds as its stream sees it; includes the waiting for launches where these are slower."""
    if device == "cpu":
        return timed(step)
    repeats = 0

    def read() -> float:
        nonlocal repeats
        if not repeats:
            for _ in range(3):  # the first calls allocate, load and compile
                step()
            repeats = max(1, min(_MOST, math.ceil(_SHORTEST / max(_milliseconds(step, 1), 1e-3))))
        return _milliseconds(step, repeats)

    return read


def _milliseconds(step: Step, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def graph_timed(step: Step, device: str) -> Reading:
    """A reading of a step's time in milliseconds without launches: captured in a CUDA graph at the first reading, then replayed."""
    if device == "cpu":
        return timed(step)
    replay: list[Reading] = []

    def read() -> float:
        if not replay:
            replay.append(event_timed(captured(step).replay, device))
        return replay[0]()

    return read


def captured(step: Step) -> torch.cuda.CUDAGraph:
    """A step in a CUDA graph, after three calls on a stream of their own, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph
