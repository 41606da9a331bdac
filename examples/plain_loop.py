"""Pre-train with a loop of your own: no command line, no run folder, only the parts.

    python examples/plain_loop.py [--steps 20]

Images and regions come from the scans that the package ships; put your own tensors in their place.
"""

from __future__ import annotations

import argparse

import timm
import torch

import mwm
from mwm.data import ReadSettings, demo_folder, read_image, read_list


def main(steps: int = 20, size: int = 224) -> list[float]:
    """Train for a few steps; returns the losses."""
    torch.manual_seed(0)
    records = [r for r in read_list(demo_folder() / "index.csv") if "xray" in r.name][:16]
    images = torch.stack([read_image(r, ReadSettings(size=(size, size)), channels=1) for r in records])
    ids = torch.tensor([r.id for r in records])

    localizer = mwm.create_localizer("tiny")
    region = localizer(images, ["both lungs"] * len(images))                     # [B, H, W] in [0, 1]
    policy = mwm.create_policy("region", overall=0.5, high=0.7)     # 50 % hidden overall, 70 % inside
    net = mwm.sparsify(timm.create_model("resnet18", features_only=True, in_chans=1))
    model = mwm.MaskedImageModel(net, patch_size=32, decoder_width=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    losses = []
    for step in range(steps):
        active = policy(region, grid=(size // 32, size // 32), seed=0, ids=ids, epoch=step)
        loss = model(images, active)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.3f}, {1 - active.float().mean():.0%} hidden")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    main(parser.parse_args().steps)
