"""What frozen features are worth: a linear probe on patients it was not fitted on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_ROUNDS = 2000


@dataclass(frozen=True)
class ProbeResult:
    """One row of the probe.

    Attributes:
        name: whose features.
        auroc: area under the ROC curve on the test patients.
        low, high: 95 % interval, bootstrap over test patients.
        features: number of features.
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


def split_by_patient(patients: Sequence[str], labels: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Half of each class's patients for fitting; no patient is on both sides.

    Args:
        patients: N patient ids.
        labels: 0 or 1. [N]
        seed: of the order in which patients are dealt.

    Returns:
        True where an image is for fitting. bool [N]
    """
    first = {}
    for patient, label in zip(patients, labels, strict=True):
        first.setdefault(patient, int(label))
    generator = np.random.default_rng(seed)
    fit: set[str] = set()
    for label in (0, 1):
        names = sorted(p for p, of in first.items() if of == label)
        fit.update(names[k] for k in generator.permutation(len(names))[: len(names) // 2])
    return np.array([p in fit for p in patients])


def pooled_features(features: Callable[[Tensor], Tensor], images: Tensor, *, batch: int = 16) -> np.ndarray:
    """Features of the deepest map averaged over the image. [B, C, H, W] to float64 [B, K]"""
    with torch.no_grad():
        parts = [features(images[k : k + batch]).mean((2, 3)) for k in range(0, len(images), batch)]
    return torch.cat(parts).double().numpy()


def recalibrate_batch_norm(model: nn.Module, images: Tensor, *, batch: int = 32) -> nn.Module:
    """Replace the running statistics of every batch norm by those of these images, whole and unlabelled; weights stay.

    An untrained network needs it to be a fair rival; a pre-trained one because its statistics are those of masked images.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    model.train()
    with torch.no_grad():
        for k in range(0, len(images), batch):
            model(images[k : k + batch])
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    return model.eval()


def pixel_statistics(images: Tensor) -> np.ndarray:
    """What a glance at brightness and contrast tells: mean, deviation, quantiles, coarse brightness map. [B, C, H, W] to [B, K]"""
    flat = images.flatten(1).double()
    quantiles = torch.quantile(flat, torch.linspace(0.05, 0.95, 7, dtype=torch.float64), dim=1).T
    coarse = nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True).double(), 4).flatten(1)
    return torch.cat([flat.mean(1, keepdim=True), flat.std(1, keepdim=True), quantiles, coarse], 1).numpy()


def probe(name: str, features: np.ndarray, labels: np.ndarray, patients: Sequence[str], fit: np.ndarray, *, seed: int = 0) -> ProbeResult:
    """Fit a logistic regression on standardised features, its strength chosen within the fit patients, and test it.

    Args:
        name: of the row.
        features: [N, K]
        labels: 0 or 1. [N]
        patients: N patient ids.
        fit: True where an image is for fitting. bool [N]
        seed: of the bootstrap.
    """
    people = np.asarray(patients)
    scores = _scores(features[fit], labels[fit], people[fit], features[~fit])
    truth, tested = labels[~fit], people[~fit]
    names, owner = np.unique(tested, return_inverse=True)
    rows = [np.flatnonzero(owner == k) for k in range(len(names))]
    generator, draws = np.random.default_rng(seed), []
    for _ in range(_ROUNDS):
        chosen = np.concatenate([rows[k] for k in generator.integers(0, len(rows), len(rows))])
        if truth[chosen].min() != truth[chosen].max():
            draws.append(auroc(truth[chosen], scores[chosen]))
    low, high = np.quantile(draws, (0.025, 0.975))
    return ProbeResult(name, auroc(truth, scores), float(low), float(high), features.shape[1], int(fit.sum()),
                       len(set(people[fit])), len(truth), len(names))


def auroc(truth: np.ndarray, scores: np.ndarray) -> float:
    """Chance that a positive case scores above a negative one, ties counting half (Mann-Whitney). truth [N], scores [N]"""
    from scipy.stats import rankdata

    positive = truth.astype(bool)
    n_in, n_out = int(positive.sum()), int((~positive).sum())
    return float((rankdata(scores)[positive].sum() - n_in * (n_in + 1) / 2) / (n_in * n_out))


def _scores(x: np.ndarray, y: np.ndarray, people: np.ndarray, new: np.ndarray) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fitted(strength: float, rows: np.ndarray | slice):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fit that stops early is still a fit; the choice below judges it
            return make_pipeline(StandardScaler(), LogisticRegression(C=strength, class_weight="balanced", max_iter=300)).fit(x[rows], y[rows])

    folds = list(StratifiedGroupKFold(4, shuffle=True, random_state=0).split(x, y, people))
    def inner(strength: float) -> float:
        return float(np.mean([auroc(y[held], fitted(strength, rows).decision_function(x[held])) for rows, held in folds]))
    return fitted(max(_STRENGTHS, key=inner), slice(None)).decision_function(new)
