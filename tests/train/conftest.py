"""A small folder of pictures with regions, and the settings of a run that takes seconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from mwm.train import PretrainConfig

IMAGES = 18


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 grayscale PNGs of 64 x 64 (a bright disc on noise) in images/, the discs as masks of the same names in masks/."""
    root = tmp_path_factory.mktemp("scans")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    rng = numpy.random.default_rng(0)
    y, x = numpy.mgrid[:64, :64]
    for i in range(IMAGES):
        centre = rng.uniform(16, 48, 2)
        disc = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < 14**2
        if i == 5:
            disc[:] = False  # an image with an empty region
        picture = 60 + 25 * rng.standard_normal((64, 64)) + 120 * disc * (1 + 0.3 * numpy.sin(x / 3))
        Image.fromarray(picture.clip(0, 255).astype("uint8")).save(root / "images" / f"scan_{i:02d}.png")
        Image.fromarray((255 * disc).astype("uint8")).save(root / "masks" / f"scan_{i:02d}.png")
    return root


@pytest.fixture
def settings(scans: Path, tmp_path: Path) -> dict[str, Any]:
    """Arguments of PretrainConfig: 4 steps per epoch, checkpoints every 3 steps."""
    return dict(images=str(scans / "images"), regions=str(scans / "masks"), out=str(tmp_path / "run"), encoder="test_resnet", image_size=96,
                patch_size=32, decoder_width=32, drop_path=0.3, crop_scale=(0.6, 1.0), epochs=3, batch_size=4, base_lr=0.02, optimizer="adamw",
                checkpoint_steps=3, checkpoint_minutes=0.0, log_every=1, panel_every=2, panel_images=2, workers=0, threads=1, progress=False,
                device="cpu", seed=3)


@pytest.fixture
def config(settings: dict[str, Any]) -> PretrainConfig:
    """`settings` as a configuration."""
    return PretrainConfig(**settings)


@pytest.fixture(scope="session")
def start_process() -> Callable[..., multiprocessing.Process]:
    """Runs code, with the names given, in a process of its own, forked from a server that has done the imports and nothing else."""

    def start(code: str, **names: Any) -> multiprocessing.Process:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mwm.train.loop", "timm", "torch.utils.tensorboard"])
        process = context.Process(target=exec, args=("import warnings\nwarnings.simplefilter('ignore')\n" + code, names))
        process.start()
        return process

    return start
