"""Plan and pack for 128 images, in per cent of the encoder's training step over as many images."""

from __future__ import annotations

from functools import partial

import torch
from mwm.bench.encoders import OURS, EncoderSides, random_active
from mwm.bench.harness import Case, Check, Match, timed
from mwm.bench.settings import Settings

import mwm

RIVAL = "encoder step of as many images"


def prepare(name: str, *, images: int = 128, batch: int = 8, size: int = 224, patch: int = 32, hidden: float = 0.6) -> Match:
    """Plan and pack of `images`, and the encoder's step on `batch` of them, its time scaled to all."""
    sides = EncoderSides(name, hidden, batch=batch, size=size, patch=patch)
    many = torch.randn(images, 3, size, size).contiguous(memory_format=torch.channels_last)
    grid = (size // patch, size // patch)
    active, visible = random_active(images, grid, hidden)
    tiles = mwm.pack(many, active, visible=visible).tiles
    patches = many.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, C, Gh, Gw, p, p]
    wrong = float((tiles != patches.permute(0, 2, 3, 1, 4, 5)[active]).sum())
    step = timed(sides.step(OURS))
    return Match(timed(lambda: mwm.pack(many, active, visible=visible)), {RIVAL: lambda: step() * images / batch}, {RIVAL: Check(wrong, 0.0)},
                 score_is="ours in % of rival", visible=visible / (grid[0] * grid[1]), warmup=1,
                 notes={"": f"step timed with {batch} images and multiplied by {images // batch}"})


def cases(settings: Settings) -> list[Case]:
    """ResNet-50, 60 % hidden."""
    if settings.smoke:
        return [Case("plan", "smoke: 4 images", partial(prepare, "resnet18", images=4, batch=1, size=64), 1)]
    return [Case("plan", "128 images", partial(prepare, "resnet50"), 5)]
