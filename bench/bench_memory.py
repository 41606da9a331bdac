"""Peak memory of the encoder's training step above parameters, gradients and optimizer state; one fresh process per side.

Peak resident memory during two steps minus what was resident before the first: activations, workspaces, what the allocator keeps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import torch
from mwm.bench.encoders import DENSE, MASKED, OURS, EncoderSides
from mwm.bench.harness import Case, Match, Reading
from mwm.bench.settings import Settings


def reading(side: str, name: str, batch: int, size: int, hidden: float) -> Reading:
    """Runs a side in a fresh process; reads MiB."""

    def read() -> float:
        command = [sys.executable, "-m", "mwm.bench.memory_side", side, name, str(batch), str(size), str(hidden)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"memory: the process of {side} ended with {done.returncode}: {done.stderr.strip()[-400:]}")
        return json.loads(done.stdout.splitlines()[-1])["MiB"]

    return read


def prepare(name: str, rivals: tuple[str, ...], *, batch: int = 32, size: int = 224, hidden: float = 0.6) -> Match:
    """The sides are compared here on two images; each then runs in its own process."""
    small = EncoderSides(name, hidden, batch=min(batch, 2), size=size)
    return Match(reading(OURS, name, batch, size, hidden), {rival: reading(rival, name, batch, size, hidden) for rival in rivals},
                 {rival: small.check(rival) for rival in rivals}, unit="MiB", score_is="ours / rival", visible=small.share, warmup=0,
                 notes={"": "fresh process per side, peak RSS of 2 steps minus RSS before the first"})


def cases(settings: Settings) -> list[Case]:
    """ResNet-50, B = 32."""
    if settings.smoke:
        return [Case("memory", "smoke: resnet18, B = 1", partial(prepare, "resnet18", (DENSE,), batch=1, size=64), 1)]
    return [Case("memory", f"{name}, B = 32, 60 % hidden", partial(prepare, name, rivals), 1, extra=name != "resnet50")
            for name, rivals in (("resnet50", (DENSE, MASKED)), ("convnext_tiny", (DENSE,)))]
