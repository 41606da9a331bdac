"""Classification by the nearest training images, weighted by the cosine of their features."""

from __future__ import annotations

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mwm.transfer.metrics import auroc

TEMPERATURE = 0.07
NEIGHBOURS = (1, 3, 5, 10, 20, 50, 100, 200)
"""Numbers of neighbours that the validation images choose among."""

_BLOCK = 4096  # queries at once


def knn_probabilities(bank: Tensor, labels: Tensor, queries: Tensor, k: int, classes: int, *, temperature: float = TEMPERATURE) -> Tensor:
    """Share of each class in the votes of the k nearest images.

    A neighbour votes with exp(cosine / temperature), as in Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (2018), and
    DINO's evaluation (Caron et al., 2021).

    Args:
        bank: Features of the training images. float [N, K]
        labels: Their classes. int64 [N]
        queries: float [M, K]
        k: Neighbours; at most N are taken.
        classes: Number of classes.
        temperature: Smaller trusts near neighbours more.

    Returns:
        float64 [M, classes], rows sum to 1
    """
    bank, labels = F.normalize(bank.double(), dim=1), labels.to(bank.device)
    parts = []
    for block in F.normalize(queries.double().to(bank.device), dim=1).split(_BLOCK):
        cosine, nearest = (block @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = ((cosine - cosine[:, :1]) / temperature).exp()  # relative to the nearest: the same shares, and no overflow
        parts.append(torch.zeros(len(block), classes, dtype=torch.float64, device=bank.device).scatter_add_(1, labels[nearest], votes))
    votes = torch.cat(parts)
    return votes / votes.sum(1, keepdim=True)


def choose_neighbours(bank: Tensor, labels: Tensor, queries: Tensor, truth: NDArray, classes: int) -> tuple[int, list[dict[str, float]]]:
    """Number of neighbours with the best AUROC on validation images; of equals the largest.

    Args:
        bank, labels, queries, classes: As for `knn_probabilities`.
        truth: Classes of the queries. int [M]

    Returns:
        The number, and a row per number that was tried.
    """
    rows = [{"k": k, "val_auroc": auroc(truth, knn_probabilities(bank, labels, queries, k, classes).cpu().numpy())} for k in NEIGHBOURS if k == 1 or k <= len(bank)]
    best = max(rows, key=lambda row: (row["val_auroc"], row["k"]))
    return int(best["k"]), rows
