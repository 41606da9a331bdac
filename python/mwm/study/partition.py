"""Dividing patients into parts of given shares, whole patients only, every class in every part."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MISSING = 100.0  # far above any imbalance: a part without a class is worse than any uneven one
_PATIENTS = 0.25  # weight of even patient counts beside even image counts


def partition(counts: NDArray, shares: tuple[float, ...], *, seed: int | list[int], restarts: int | None = None) -> NDArray:
    """Assign patients to parts so that every part holds about its share of the images of every class.

    Minimised is, over parts f and quantities m (images of each class, all images, patients of each class with weight 1/4), the sum of
    (share of m in f − shares[f])², and 100 for each class that a part lacks. Patients come largest first in a jittered order, each to the
    part that needs it most; then single moves and swaps while they help; the best of many orders is kept. scikit-learn's
    StratifiedGroupKFold does the first step once and may leave a part without a class where a class has about as many patients as there are parts.

    Args:
        counts: Images of each class of each patient. int [P, K]
        shares: Of the F parts; they sum to 1.
        seed: Of the orders; the result depends on nothing else.
        restarts: Orders that are tried; by the number of patients where left out.

    Returns:
        Part of each patient; parts may lack a class where no assignment was found that avoids it. int [P]
    """
    counts = np.asarray(counts, dtype=np.float64)
    target = np.asarray(shares, dtype=np.float64)
    has = counts > 0
    quantities = np.concatenate([counts / np.maximum(counts.sum(0), 1), counts.sum(1, keepdims=True) / max(counts.sum(), 1),
                                 np.sqrt(_PATIENTS) * has / np.maximum(has.sum(0), 1)], axis=1)
    aims = np.outer(target, np.concatenate([np.ones(counts.shape[1] + 1), np.full(counts.shape[1], np.sqrt(_PATIENTS))]))
    generator = np.random.default_rng(seed)
    size = counts.sum(1)
    best, best_cost = np.zeros(len(counts), dtype=np.int64), np.inf
    for _ in range(restarts or max(4, min(60, 6000 // max(len(counts), 1)))):
        order = np.argsort(-size * generator.uniform(0.5, 1.5, len(size)), kind="stable")
        parts = _greedy(quantities, has, aims, order)
        parts = _descend(quantities, has, aims, parts)
        cost = _cost(quantities, has, aims, parts)
        if cost < best_cost - 1e-12:
            best, best_cost = parts, cost
    return best


def _greedy(quantities: NDArray, has: NDArray, aims: NDArray, order: NDArray) -> NDArray:
    sums, owners = np.zeros_like(aims), np.zeros((len(aims), has.shape[1]))
    parts = np.zeros(len(order), dtype=np.int64)
    for p in order:
        gain = 2 * (sums - aims) @ quantities[p] - _MISSING * ((owners == 0) & has[p]).sum(1)
        part = int(np.argmin(gain))
        parts[p] = part
        sums[part] += quantities[p]
        owners[part] += has[p]
    return parts


def _descend(quantities: NDArray, has: NDArray, aims: NDArray, parts: NDArray) -> NDArray:
    """The best single move, again and again; then swaps of two patients where there are few enough to look at all."""
    parts, rows = parts.copy(), np.arange(len(parts))
    for _ in range(10 * len(parts)):
        onehot = (parts[None] == np.arange(len(aims))[:, None]).astype(np.float64)
        sums, owners = onehot @ quantities, onehot @ has
        pull = quantities @ (sums - aims).T
        change = 2 * (pull - pull[rows, parts][:, None]) + 2 * np.square(quantities).sum(1)[:, None]
        lost = ((owners[parts] == 1) & has).sum(1)
        won = has.astype(np.float64) @ (owners == 0).T.astype(np.float64)
        change += _MISSING * (lost[:, None] - won)
        change[rows, parts] = 0
        p, part = np.unravel_index(int(np.argmin(change)), change.shape)
        if change[p, part] < -1e-12:
            parts[p] = part
        elif len(parts) > 60 or not _swap(quantities, has, aims, parts):
            break
    return parts


def _swap(quantities: NDArray, has: NDArray, aims: NDArray, parts: NDArray) -> bool:
    """Make the exchange of two patients that helps most, in place; missing classes are looked at for the best few only."""
    onehot = (parts[None] == np.arange(len(aims))[:, None]).astype(np.float64)
    pull = (quantities @ (onehot @ quantities - aims).T)[:, parts]  # [p, q]: patient p, residual of the part of q
    own = np.diag(pull)
    distance = np.square(quantities[:, None] - quantities[None]).sum(2)
    change = 2 * (pull.T - own[:, None] - own[None] + pull + distance)
    change[parts[:, None] == parts[None]] = 0
    now = _cost(quantities, has, aims, parts)
    for flat in np.argsort(change, axis=None)[:20]:
        a, b = np.unravel_index(int(flat), change.shape)
        if change[a, b] >= -1e-12:
            return False
        parts[[a, b]] = parts[[b, a]]
        if _cost(quantities, has, aims, parts) < now - 1e-12:
            return True
        parts[[a, b]] = parts[[b, a]]
    return False


def _cost(quantities: NDArray, has: NDArray, aims: NDArray, parts: NDArray) -> float:
    onehot = (parts[None] == np.arange(len(aims))[:, None]).astype(np.float64)
    return float(np.square(onehot @ quantities - aims).sum() + _MISSING * (onehot @ has == 0).sum())
