"""What frozen features are worth: a linear probe on patients it was not fitted on, and the rivals it must beat."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mwm.transfer.metrics import auroc, bootstrap

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class ProbeResult:
    """A probe's figure on the test patients.

    Attributes:
        auroc: Area under the ROC curve; for more than two classes the mean of one against the rest.
        low, high: 95 % interval, bootstrap over test patients.
        images, patients: What the figure rests on.
        strength: Inverse regularisation C of the logistic regression.
        probabilities: Of the test images. [N, K]
    """

    auroc: float
    low: float
    high: float
    images: int
    patients: int
    strength: float
    probabilities: NDArray

    def __str__(self) -> str:
        return f"AUROC {self.auroc:.3f} (95 % interval {self.low:.3f} to {self.high:.3f}; {self.images} images of {self.patients} patients)"


def linear_probe(features_fit: NDArray, labels_fit: NDArray, features_test: NDArray, labels_test: NDArray, groups: Sequence[str], *,
                 groups_fit: Sequence[str] | None = None, rounds: int = 2000, seed: int = 0) -> ProbeResult:
    """Logistic regression on standardised features, judged by AUROC on the test patients.

    Mean and deviation come from the fit images. C is chosen on the fit images alone: the best mean AUROC of four folds,
    made by patient where `groups_fit` is given.

    Args:
        features_fit: [N, K]
        labels_fit: Classes from 0. int [N]
        features_test: [M, K]
        labels_test: int [M]
        groups: Patient of each test image. M
        groups_fit: Patient of each fit image. N
        rounds: Bootstrap draws.
        seed: Of folds and draws.

    Raises:
        ValueError: fewer than two classes, shapes that do not fit, features that are not finite, or a patient on both sides.
    """
    x, y = np.asarray(features_fit, np.float64), np.asarray(labels_fit)
    x_test, y_test = np.asarray(features_test, np.float64), np.asarray(labels_test)
    for name, values, labels in (("fit", x, y), ("test", x_test, y_test)):
        if values.ndim != 2 or len(values) != len(labels):
            raise ValueError(f"linear_probe: features_{name} must be [N, K] with one label each, got {list(values.shape)} and {len(labels)} labels.")
        if not np.isfinite(values).all():
            raise ValueError(f"linear_probe: features_{name} must be finite, got NaN or infinity. Look for an encoder that diverged.")
        if len(np.unique(labels)) < 2:
            raise ValueError(f"linear_probe: labels_{name} must hold at least two classes, got {len(np.unique(labels))}.")
    if len(groups) != len(y_test):
        raise ValueError(f"linear_probe: groups must name the patient of each of the {len(y_test)} test images, got {len(groups)}.")
    if groups_fit is not None and set(groups_fit) & set(groups):
        raise ValueError(f"linear_probe: groups must be other patients than groups_fit, got {len(set(groups_fit) & set(groups))} on both sides.")
    unseen = set(np.unique(y_test)) - set(np.unique(y))
    if unseen:
        raise ValueError(f"linear_probe: labels_test must occur in labels_fit, got class {min(unseen)} in the test only.")
    strength = choose_strength(x, y, groups_fit, seed=seed)
    probabilities = fit_logistic(x, y, strength).predict_proba(x_test)
    # Columns by class number, also where the fit images lack a class between others.
    full = np.zeros((len(y_test), int(y.max()) + 1))
    full[:, np.unique(y)] = probabilities
    low, high = bootstrap(auroc, y_test, full, groups, rounds=rounds, seed=seed)
    return ProbeResult(auroc(y_test, full), low, high, len(y_test), len(set(groups)), strength, full)


def fit_logistic(x: NDArray, y: NDArray, strength: float):
    """Standardisation and logistic regression with inverse regularisation `strength`. x [N, K], y int [N] -> sklearn pipeline"""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that stops at its iteration limit is still a fit; the held-out folds judge it
        return make_pipeline(StandardScaler(), LogisticRegression(C=strength, class_weight="balanced", max_iter=500)).fit(x, y)


def choose_strength(x: NDArray, y: NDArray, groups: Sequence[str] | None, *, seed: int = 0) -> float:
    """Inverse regularisation with the best mean AUROC over folds of the fit images; patients stay together.

    Args:
        x: [N, K]
        y: int [N]
        groups: Patient of each image, or None.
        seed: Of the folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    units = np.arange(len(y)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    smallest = min(len(set(units[y == k])) for k in np.unique(y))
    count = min(4, smallest)
    if count < 2:
        return 0.01
    folds = list(StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(x, y, units))
    classes = np.unique(y)
    scores = []
    for strength in STRENGTHS:
        parts = []
        for rows, held in folds:
            if len(np.unique(y[rows])) < len(classes):
                continue
            value = auroc(np.searchsorted(classes, y[held]), fit_logistic(x[rows], y[rows], strength).predict_proba(x[held]))
            if np.isfinite(value):
                parts.append(value)
        scores.append(np.mean(parts) if parts else -np.inf)
    return STRENGTHS[int(np.argmax(scores))] if np.isfinite(max(scores)) else 0.01


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, loader: Iterable[Tensor]) -> nn.Module:
    """Replace every batch norm's running statistics by the mean over these unlabelled batches; weights stay.

    An untrained network needs it to be a fair rival of a pre-trained one; a pre-trained one because its statistics are those
    of masked images.

    Args:
        model: Changed in place.
        loader: Batches [B, C, H, W], prepared as the model expects; a batch of one image is joined to the one before it.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: the loader is empty while the model has batch norms.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return model.eval()
    kept = [(m.momentum, m.running_mean.clone(), m.running_var.clone(), m.num_batches_tracked.clone()) for m in norms]
    model.eval()  # dropout and drop path stay off
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    batches = 0
    for images in _no_lone_image(loader):
        model(images)
        batches += 1
    for norm, (momentum, mean, var, count) in zip(norms, kept, strict=True):
        norm.momentum = momentum
        if not batches:
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
            norm.num_batches_tracked.copy_(count)
    if not batches:
        raise ValueError("recalibrate_batchnorm: loader must yield at least one batch, got none.")
    return model.eval()


def _no_lone_image(loader: Iterable[Tensor]) -> Iterator[Tensor]:
    """The batches, a rest of one image joined to the batch before it: alone it has no variance where the last map is 1 x 1, and would count like a whole batch."""
    held: Tensor | None = None
    for images in loader:
        if held is not None and len(images) == 1:
            yield torch.cat([held, images])
            held = None
            continue
        if held is not None:
            yield held
        held = images
    if held is not None:
        yield held


def pixel_statistics(images: Tensor, *, side: int = 4) -> NDArray:
    """What a glance at brightness and contrast tells, without any network.

    Args:
        images: float [B, C, H, W]
        side: Edge of the coarse brightness map.

    Returns:
        Mean, deviation, nine quantiles (5 … 95 %) over all channels, and the mean brightness in side x side cells. float64 [B, 11 + side²]
    """
    flat = images.detach().flatten(1).double()
    points = torch.linspace(0.05, 0.95, 9, dtype=torch.float64, device=flat.device)
    quantiles = torch.stack([torch.quantile(row[:: max(1, row.numel() // 200_000)], points) for row in flat])
    coarse = nn.functional.adaptive_avg_pool2d(images.detach().double().mean(1, keepdim=True), side).flatten(1)
    return torch.cat([flat.mean(1, keepdim=True), flat.std(1, keepdim=True), quantiles, coarse], 1).cpu().numpy()
