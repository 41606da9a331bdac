"""Reconstruction panels: the same few images every time, with the masks of epoch 0."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from mwm import view
from mwm.mim import MaskedImageModel
from mwm.train.checkpoint import write_atomic
from mwm.train.export import Preprocessing


def write_panel(path: Path, model: MaskedImageModel, images: Tensor, active: Tensor, preprocessing: Preprocessing, region: Tensor | None = None) -> None:
    """Reconstruct and draw: image, what the encoder sees, what the model makes of it.

    The model runs in eval mode and is left as it was: a panel changes no number of the run.

    Args:
        path: the PNG.
        images: in [0, 1]. float32 [B, C, H, W]
        active: True = visible. bool [B, Gh, Gw]
        preprocessing: of the run.
        region: in [0, 1]. float [B, H, W]
    """
    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    model.eval()
    try:
        rebuilt = model.reconstruct(preprocessing.normalise(images).to(device), active).float().cpu()
    finally:
        for module, mode in training.items():
            module.training = mode
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    picture = view.reconstruction_panel(images, active, (rebuilt * std + mean).clamp(0, 1), region=region)
    path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomic(path, lambda file: file.write(buffer.getvalue()))
