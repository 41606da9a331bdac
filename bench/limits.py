"""What this machine can do at most: arithmetic and memory rates, read in every pair beside the sides, as a shared machine changes its pace.

The arithmetic limit is the rate of oneDNN's own 3x3 convolution at a size that suits it (4 images of 56 x 56, 64 channels,
channels-last, no mask). On the quiet CPU of the committed rows it reaches 220 GFLOP/s on two threads in float32 (larger ones 228), 94 %
of what register-only chains of fused multiply-adds reach (2 x 117 GFLOP/s), and 440 in bfloat16.
The memory limit is the rate of the faster of a copy (read + written bytes) and plain reads of as many bytes: small maps lie in the
caches, and their limit is the caches' rate. Which one is faster is found once per size and process.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from mwm.bench.harness import Limit, Reading, Step, seconds, timed


def flop_limit(gflop: float, dtype: torch.dtype = torch.float32, *, smoke: bool = False) -> Limit:
    """The limit of a step that needs `gflop` of arithmetic."""
    return Limit(gflop, _flop_rate(dtype, smoke), "GFLOP/s", "oneDNN 3x3 convolution")


def byte_limit(gigabytes: float) -> Limit:
    """The limit of a step that moves at least `gigabytes`."""
    words, rate = _byte_rate(max(10, round(math.log2(max(1e9 * gigabytes, 1)))), torch.get_num_threads())
    return Limit(gigabytes, rate, "GB/s", f"{words} of as many bytes")


@functools.cache
def _flop_rate(dtype: torch.dtype, smoke: bool) -> Reading:
    batch, channels, edge = (1, 16, 16) if smoke else (4, 64, 56)
    x = torch.randn(batch, channels, edge, edge, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    gflop = 2e-9 * batch * edge**2 * channels**2 * 9

    def step() -> None:
        with torch.no_grad():
            F.conv2d(x, weight, None, 1, 1)

    read = timed(step)
    return lambda: gflop / (1e-3 * read())


@functools.cache
def _byte_rate(log_bytes: int, threads: int) -> tuple[str, Reading]:
    """What is fastest at this size and number of threads, and a reading of its rate."""
    number = 2**log_bytes // 4
    source = torch.ones(number)
    half, target = source[: number // 2], torch.ones(number // 2)
    steps: dict[str, Step] = {"copy": lambda: target.copy_(half), "maximum": source.amax, "sum": source.sum}
    words = min(steps, key=lambda name: fastest(steps[name], 9))
    read = timed(steps[words])
    return words, lambda: 4e-9 * number / (1e-3 * read())


def fastest(step: Step, repeats: int) -> float:
    """Seconds of the fastest of several calls, after one that is thrown away."""
    step()
    return min(seconds(step) for _ in range(repeats))
