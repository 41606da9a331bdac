"""The second half of the demo: a pre-training run of a few minutes, and what it learnt to rebuild."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mwm.demo.page import Training
from mwm.demo.regions import Shown
from mwm.demo.scans import ASPECT, Scans
from mwm.masking import Policy
from mwm.mim import RECOMMENDED_MIN_STD
from mwm.train import PretrainConfig, load_encoder, pretrain
from mwm.train import checkpoint as saved
from mwm.train.distributed import World
from mwm.train.logs import read_metrics
from mwm.train.loop import build_model
from mwm.view import loss_curve, reconstruction_sheet

SIZE, PATCH = 160, 32
MOST_EPOCHS, FEWEST_EPOCHS = 60, 2


def configure(demo_seconds: float, scans: Scans, regions: Path, out: Path, *, quick: bool, seed: int) -> PretrainConfig:
    """The demo's run: a ResNet-18 and a narrow decoder, small enough for a few minutes on two cores."""
    config = PretrainConfig(images=str(scans.index), out=str(out), regions=str(regions), encoder="resnet18", image_size=SIZE, patch_size=PATCH, channels=1,
                            decoder_width=128, optimizer="adamw", base_lr=3.2e-2, batch_size=8, min_std=RECOMMENDED_MIN_STD, epochs=1, warmup_epochs=0.1,
                            read={"aspect": ASPECT}, panel_every=0, checkpoint_minutes=0, overwrite=True, workers=0, split="val" if quick else None, seed=seed)
    epochs = 1 if quick else fit_epochs(config, len(scans.records), demo_seconds)
    return config.replace(epochs=epochs, warmup_epochs=min(2.0, 0.1 * epochs))


def fit_epochs(config: PretrainConfig, images: int, seconds: float) -> int:
    """How many epochs fit into `seconds` on this machine, from a few timed steps.

    Args:
        config: the run; its own epochs are not looked at.
        images: number of images of an epoch.
        seconds: time for the steps.
    """
    model = build_model(config, World(0, 1, torch.device("cpu")))
    batch = torch.rand(config.batch_size, 1, *config.size)
    order = torch.rand(config.batch_size, config.grid[0] * config.grid[1]).argsort(1)
    active = (order < round(0.45 * order.shape[1])).view(-1, *config.grid)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        model(batch, active).backward()
        times.append(time.perf_counter() - start)
    per_epoch = max(1, images // config.batch_size) * min(times[1:]) * 1.12  # the optimizer and the loader come on top
    return int(np.clip(seconds / per_epoch, FEWEST_EPOCHS, MOST_EPOCHS))


def train(config: PretrainConfig) -> tuple[Path, float]:
    """Run it; the run's folder and its seconds."""
    start = time.monotonic()
    return pretrain(config, command="mwm demo"), time.monotonic() - start


def rebuild(run: Path, shown: Shown, active: Tensor) -> Tensor:
    """What the trained model makes of the shown scans. [3, C, H, W] in [0, 1]"""
    config, preprocessing = PretrainConfig.from_run(run), load_encoder(run).preprocessing
    model = build_model(config, World(0, 1, torch.device("cpu")))
    path = run / saved.NAME
    saved.load_into(model, saved.load(path)["model"], path.name)
    model.eval()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (model.reconstruct(preprocessing.normalise(shown.images), active) * std + mean).clamp(0, 1)


def describe(config: PretrainConfig, run: Path, seconds: float, shown: Shown, active: Tensor, shares, policy: Policy) -> Training:
    """Curve, shares, reconstruction and figures of a finished run."""
    metrics = read_metrics(run / "metrics.csv")
    steps, losses = np.array(metrics["step"]), np.array(metrics["loss"])
    tail = max(1, len(losses) // 10)
    seen = len(steps) * config.batch_size
    first, last = float(np.mean(losses[:tail])), float(np.mean(losses[-tail:]))
    facts = [(f"{first:.2f} → {last:.2f}", "mean loss, first and last tenth of the steps"), (f"{len(steps)}", f"steps of {config.batch_size} scans, {config.epochs} epochs"),
             (f"{seen / seconds:.0f} / s", "scans seen per second"), (f"{seconds:.0f} s", "of training")]
    settings = [("encoder", config.encoder), ("image", f"{config.size[0]} x {config.size[1]} pixels, patches of {config.patch_size}"),
                ("hidden", f"{policy.high:.0%} inside the region, {policy.low:.0%} outside; images with an empty region at the mean share"),
                ("decoder width", str(config.decoder_width)), ("optimizer", f"{config.optimizer}, learning rate {config.base_lr:g} per 256 images, cosine"),
                ("seed", str(config.seed))]
    chart = loss_curve({"loss": (steps, losses)}, smooth=max(3, len(steps) // 25), y_label="loss")
    sheet = reconstruction_sheet(shown.images, active, rebuild(run, shown, active), regions=shown.regions, captions=shown.labels())
    return Training(chart, shares, sheet, facts, settings)
