"""Figures of two maps, and the map that knows nothing but the middle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CENTRE = 0.25  # standard deviation of the prior in the middle, as a share of each edge


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson correlation over pixels; NaN where one is constant. float [H, W] each"""
    a, b = a.double().flatten() - a.double().mean(), b.double().flatten() - b.double().mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if float(a.abs().max()) > 1e-6 and float(b.abs().max()) > 1e-6 else math.nan


def mass_shift(a: Tensor, b: Tensor) -> float:
    """sum |a - b| / sum (a + b) of two maps that are not negative; 0 where both are empty. float [H, W] each"""
    total = float((a + b).double().sum())
    return float((a - b).abs().double().sum()) / total if total > 0 else 0.0


def centre_prior(height: int, width: int) -> Tensor:
    """A Gaussian in the middle, a quarter of each edge wide. float32 [H, W]"""
    rows, columns = ((torch.arange(n) + 0.5) / n - 0.5 for n in (height, width))
    return torch.exp(-(rows[:, None] ** 2 + columns[None] ** 2) / (2 * _CENTRE**2))
