"""What a frozen encoder is worth: a logistic regression, or the nearest training images, on its pooled features."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mwm.train.export import Encoder
from mwm.transfer.config import FinetuneConfig, TransferError
from mwm.transfer.images import CaseImages
from mwm.transfer.knn import TEMPERATURE, choose_neighbours, knn_probabilities
from mwm.transfer.metrics import auroc
from mwm.transfer.network import PooledFeatures, extract
from mwm.transfer.probe import STRENGTHS, fit_logistic, recalibrate_batchnorm
from mwm.transfer.results import Outcome

_STATISTICS = "statistics of the training images, unlabelled"


def linear(config: FinetuneConfig, encoder: Encoder, sets: Mapping[str, CaseImages], device: torch.device) -> Outcome:
    """Standardised pooled features and a logistic regression; C by the val split, then fitted to train and val together.

    With a share of the labels only, the fit on train alone is kept: the val split has all its labels.
    """
    features = _features(config, encoder, sets, device)
    x = {split: _extract(config, features, sets[split], device).double().numpy() for split in ("train", "val")}
    labels = {split: sets[split].labels.cpu().numpy() for split in x}
    fits = {c: fit_logistic(x["train"], labels["train"], c) for c in STRENGTHS}
    scores = {c: auroc(labels["val"], fits[c].predict_proba(x["val"])) for c in STRENGTHS}
    strength = max(scores, key=lambda c: (scores[c], -c))
    val, final = fits[strength].predict_proba(x["val"]), fits[strength]
    if config.label_fraction == 1:
        final = fit_logistic(np.concatenate([x["train"], x["val"]]), np.concatenate([labels["train"], labels["val"]]), strength)
    test = final.predict_proba(_extract(config, features, sets["test"], device).double().numpy())
    scaler, regression = final[0], final[1]
    head = {"mean": scaler.mean_, "scale": scaler.scale_, "weight": regression.coef_, "bias": regression.intercept_}
    return Outcome("linear probe", {"val": val, "test": test}, _body(encoder), [{"C": c, "val_auroc": s} for c, s in scores.items()],
                   {"C": strength, "features": x["train"].shape[1], "batch_norm": _STATISTICS},
                   {"probe.safetensors": {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in head.items()}})


def neighbours(config: FinetuneConfig, encoder: Encoder, sets: Mapping[str, CaseImages], device: torch.device, classes: int) -> Outcome:
    """The nearest training images vote; their number is chosen on the val split."""
    features = _features(config, encoder, sets, device)
    bank, val = (_extract(config, features, sets[split], device) for split in ("train", "val"))
    labels = sets["train"].labels.cpu()
    k, rows = choose_neighbours(bank, labels, val, sets["val"].labels.cpu().numpy(), classes)
    test = _extract(config, features, sets["test"], device)
    probabilities = {split: knn_probabilities(bank, labels, x, k, classes).numpy() for split, x in (("val", val), ("test", test))}
    return Outcome("k-NN", probabilities, _body(encoder), rows, {"k": k, "temperature": TEMPERATURE, "features": bank.shape[1], "batch_norm": _STATISTICS},
                   {"knn.safetensors": {"features": bank, "labels": labels}}, {"k": k, "temperature": TEMPERATURE})


def logistic_probabilities(features: Tensor, head: Mapping[str, Tensor]) -> Tensor:
    """Probabilities of a stored logistic regression. features [B, K], float64 -> float64 [B, classes]"""
    scores = (features.double() - head["mean"]) / head["scale"] @ head["weight"].T + head["bias"]
    if scores.shape[1] == 1:
        scores = torch.cat([torch.zeros_like(scores), scores], 1)
    return torch.softmax(scores, 1)


def _features(config: FinetuneConfig, encoder: Encoder, sets: Mapping[str, CaseImages], device: torch.device) -> PooledFeatures:
    """Pooled features whose batch norms know whole images: those of pre-training saw masked ones, those of random weights none."""
    features = PooledFeatures(encoder.model).to(device)
    recalibrate_batchnorm(features, (images for images, _, _ in sets["train"].batches(config.batch_size)))
    return features


def _extract(config: FinetuneConfig, features: PooledFeatures, images: CaseImages, device: torch.device) -> Tensor:
    values = extract(features, images.batches(config.batch_size), device)
    if not values.isfinite().all():
        raise TransferError("finetune: features of the encoder must be finite, got NaN. Pre-train again; the run has diverged.")
    return values


def _body(encoder: Encoder) -> dict[str, Tensor]:
    return {key: value for key, value in encoder.model.state_dict().items() if key not in encoder.head}
