"""What frozen features are worth: linear probes on X-ray patients they were not fitted on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from mwm.train import load_encoder
from mwm.train.export import full_model
from mwm.transfer import linear_probe, pixel_statistics, recalibrate_batchnorm

PRETRAINED, UNTRAINED, PIXELS = "pre-trained encoder", "untrained encoder", "pixel statistics"


@dataclass(frozen=True)
class ProbeRow:
    """One row of the probe.

    Attributes:
        name: whose features.
        auroc: area under the ROC curve on the test patients.
        low, high: 95 % interval, bootstrap over test patients.
        features: number of features of an image.
        fit_images, fit_patients, test_images, test_patients: what it was fitted and tested on.
    """

    name: str
    auroc: float
    low: float
    high: float
    features: int
    fit_images: int
    fit_patients: int
    test_images: int
    test_patients: int


def split_by_patient(patients: Sequence[str], labels: NDArray, *, seed: int = 0) -> NDArray:
    """Half of each class's patients for fitting; no patient is on both sides.

    Args:
        patients: N patient ids.
        labels: 0 or 1. [N]
        seed: of the order in which patients are dealt.

    Returns:
        True where an image is for fitting. bool [N]
    """
    first: dict[str, int] = {}
    for patient, label in zip(patients, labels, strict=True):
        first.setdefault(patient, int(label))
    generator = np.random.default_rng(seed)
    fit: set[str] = set()
    for label in sorted(set(first.values())):
        names = sorted(p for p, of in first.items() if of == label)
        fit.update(names[k] for k in generator.permutation(len(names))[: len(names) // 2])
    return np.array([p in fit for p in patients])


def run_probe(run: str | Path, images: Tensor, labels: NDArray, patients: Sequence[str], *, seed: int = 0, rounds: int = 2000) -> list[ProbeRow]:
    """Probe the pre-trained encoder, the same encoder untrained, and pixel statistics alone.

    Both encoders get their batch-norm statistics from the fit images, whole; all features are standardised on them.

    Args:
        run: folder of the pre-training run.
        images: in [0, 1]. float32 [N, C, H, W]
        labels: 0 or 1. [N]
        patients: N patient ids.
        seed: of split, untrained weights and intervals.
        rounds: bootstrap draws.
    """
    fit = split_by_patient(patients, labels, seed=seed)
    people = np.asarray(patients)
    encoder = load_encoder(run)
    torch.manual_seed(seed)
    untrained = full_model(encoder.name, encoder.preprocessing.channels, 1)
    inputs = encoder.preprocessing.normalise(images)
    sides: dict[str, Callable[[], NDArray]] = {
        PRETRAINED: lambda: _pooled(encoder.model, inputs, fit),
        UNTRAINED: lambda: _pooled(untrained, inputs, fit),
        PIXELS: lambda: pixel_statistics(images),
    }
    rows = []
    for name, features in tqdm(sides.items(), desc="probe", unit="probe", dynamic_ncols=True):
        x = features()
        result = linear_probe(x[fit], labels[fit], x[~fit], labels[~fit], list(people[~fit]), groups_fit=list(people[fit]), rounds=rounds, seed=seed)
        rows.append(ProbeRow(name, result.auroc, result.low, result.high, x.shape[1], int(fit.sum()), len(set(people[fit])), result.images, result.patients))
    return rows


@torch.no_grad()
def _pooled(model: nn.Module, images: Tensor, fit: NDArray, *, batch: int = 16) -> NDArray:
    """The deepest map averaged over each image. [N, C, H, W] to float64 [N, K]"""
    recalibrate_batchnorm(model, images[torch.from_numpy(fit)].split(32))
    features = model.forward_features  # every timm model has it
    return torch.cat([features(part).mean((2, 3)) for part in images.split(batch)]).double().numpy()
