"""One side of the memory bench, in a process of its own: how far does the resident memory rise during training steps?

    python -m mwm.bench.memory_side SIDE NAME BATCH SIZE HIDDEN      prints one JSON object

Parameters, gradients, optimizer state, images and the maps' gradients lie in memory before the count begins.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
from pathlib import Path

import torch
from mwm.bench.encoders import DENSE, MASKED, OURS, EncoderSides

STEPS = 2


def resident() -> tuple[float, float]:
    """Resident memory now and its peak, MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(status[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))


def forget_peak() -> str:
    """Set the peak to what is resident now; returns how the peak is to be read."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return "peak since the process began"
    return "peak since the first step began"


def main(side: str, name: str, batch: int, size: int, hidden: float) -> dict[str, object]:
    """Run the steps and report MiB."""
    sides = EncoderSides(name, hidden, batch=batch, size=size)
    network = {OURS: lambda: sides.ours, DENSE: lambda: sides.dense, MASKED: lambda: sides.masked}[side]()
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    for p in parameters:
        p.grad = torch.zeros_like(p).fill_(0.0)
    optimizer.step()  # with a learning rate of 0: allocates the state, changes nothing
    layout = torch.contiguous_format if side == MASKED else torch.channels_last
    shapes = zip(sides.channels, sides.strides, strict=True)
    gradients = [torch.randn(batch, c, size // s, size // s).contiguous(memory_format=layout) / (c * (size // s) ** 2) ** 0.5 for c, s in shapes]
    forward = sides.maps(side)
    gc.collect()
    how = forget_peak()
    before, _ = resident()
    for _ in range(STEPS):
        torch.autograd.backward(forward(), gradients)
    _, peak = resident()
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"side": side, "MiB": peak - before, "before": before, "peak": peak, "whole": whole, "how": how, "torch": torch.__version__}


if __name__ == "__main__":
    words = sys.argv[1:]
    print(json.dumps(main(words[0], words[1], int(words[2]), int(words[3]), float(words[4]))))
