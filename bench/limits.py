"""What this machine can do at most: arithmetic and memory rates, measured once per process, by the fastest of several means.

The arithmetic limit is the best rate of oneDNN's own 3x3 and 1x1 convolutions at sizes that suit them (large, channels-last, no
mask). On the CPU of the committed rows they reach 228 GFLOP/s on two threads, 97 % of what register-only chains of fused
multiply-adds reach (2 x 117 GFLOP/s), so that 100 % here is 97 % of the hardware.
The memory limit is the best rate of a copy (read + written bytes) and of a plain read of as many bytes: small maps lie in the
caches, and their limit is the caches' rate.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from mwm.bench.harness import Limit, Step, seconds


def flop_limit(gflop: float, dtype: torch.dtype = torch.float32, *, smoke: bool = False) -> Limit:
    """The limit of a step that needs `gflop` of arithmetic."""
    rate = flop_rate(dtype, torch.get_num_threads(), smoke)
    return Limit(gflop, rate, f"{rate:.0f} GFLOP/s (best oneDNN convolution)")


def byte_limit(gigabytes: float) -> Limit:
    """The limit of a step that moves at least `gigabytes`."""
    rate = byte_rate(max(10, round(math.log2(max(1e9 * gigabytes, 1)))), torch.get_num_threads())
    return Limit(gigabytes, rate, f"{rate:.0f} GB/s (best copy or read of as many bytes)")


@functools.cache
def flop_rate(dtype: torch.dtype, threads: int, smoke: bool = False) -> float:
    """Best rate of a convolution on this machine, GFLOP/s; `threads` is there to be remembered by."""
    shapes = [(1, 32, 16, 3)] if smoke else [(4, 256, 56, 3), (4, 64, 56, 3), (4, 1024, 28, 1)]
    best = 0.0
    for batch, channels, edge, kernel in shapes:
        x = torch.randn(batch, channels, edge, edge, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, kernel, kernel, dtype=dtype).contiguous(memory_format=torch.channels_last)
        gflop = 2e-9 * batch * edge**2 * channels**2 * kernel**2

        def step(x: torch.Tensor = x, weight: torch.Tensor = weight, padding: int = kernel // 2) -> None:
            with torch.no_grad():
                F.conv2d(x, weight, None, 1, padding)

        best = max(best, gflop / fastest(step, 2 if smoke else 12))
    return best


@functools.cache
def byte_rate(log_bytes: int, threads: int) -> float:
    """Best rate at which 2^log_bytes bytes are read, or read and written, GB/s; `threads` is there to be remembered by."""
    number = 2**log_bytes // 4
    source = torch.ones(number)
    half, target = source[: number // 2], torch.ones(number // 2)
    times = [fastest(step, 15) for step in (lambda: target.copy_(half), source.amax, source.sum)]
    return 4e-9 * number / min(times)


def fastest(step: Step, repeats: int) -> float:
    """Seconds of the fastest of several calls, after one that is thrown away."""
    step()
    return min(seconds(step) for _ in range(repeats))
