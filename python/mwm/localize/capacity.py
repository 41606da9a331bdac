"""The information bottleneck of M2IB (Wang et al., NeurIPS 2023, arXiv 2312.17174): how much a noisy activation still says, and the optimisation of the noise.

An activation h becomes z = λ h + (1 − λ) σ ε with λ = sigmoid(α) and ε ~ N(0, 1). What z says about h is KL(N(λ h, (1 − λ)² σ²) ‖ N(0, σ²)) nats at most. α is moved so that
z says little and the embedding keeps its cosine with a text; where much has to be said is where the text is about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

START = 5.0
"""First value of α, as in the authors' code: λ = 0.993."""

COSINE_EPS = 1e-6

Suffix = Callable[[Tensor], Tensor]
"""Tokens [N, T, D] → embeddings [N, E]."""

Noise = Callable[[int, int], Tensor]
"""(image, copies) → the next ε of that image, float32 [copies, T, D]"""


def capacity(h: Tensor, alpha: Tensor, sigma: float = 1.0) -> Tensor:
    """Capacity per element, nats.

    0.5 [(λ h / σ)² + (1 − λ)² − 1 − log (1 − λ)²], with log(1 − λ) = −softplus(α): finite for every α, where 1 − sigmoid(α) rounds to 0 from α = 17 on.

    Args:
        h: Activations. float [...]
        alpha: float [...]
        sigma: Standard deviation of noise and prior.

    Returns:
        float [...]
    """
    kept, lost = torch.sigmoid(alpha), torch.sigmoid(-alpha)
    return 0.5 * ((kept * h / sigma) ** 2 + lost**2 - 1) + F.softplus(alpha)


def capacity_slope(h: Tensor, alpha: Tensor, sigma: float = 1.0) -> Tensor:
    """Derivative of `capacity` in α. float [...]"""
    kept, lost = torch.sigmoid(alpha), torch.sigmoid(-alpha)
    return kept * lost * (kept * (h / sigma) ** 2 - lost) + kept


@dataclass(frozen=True)
class Schedule:
    """How α is optimised.

    Attributes:
        copies: Noisy copies in each step; one number per update.
        lr: Step size of Adam.
        beta: Weight of the mean capacity against the cosine.
        sigma: Standard deviation of noise and prior.
        antithetic: Copies come in pairs ε, −ε, whose mean gradient is less noisy.
    """

    copies: Sequence[int]
    lr: float = 1.0
    beta: float = 0.1
    sigma: float = 1.0
    antithetic: bool = False


def optimise(h: Tensor, text: Tensor, suffix: Suffix, schedule: Schedule, noise: Noise, in_flight: int) -> Tensor:
    """α after the updates, for several images at once, each on its own.

    The loss of an image is beta · mean(capacity) − mean over copies of cos(text, suffix(z)). Only the gradient of z is formed; that of the capacity is written down.

    Args:
        h: Activations after the bottleneck's block. float32 [B, T, D]
        text: Text embeddings. float32 [B, E]
        suffix: The rest of the network.
        schedule: Copies, steps and weights.
        noise: ε of each image, independent of what else is in the batch.
        in_flight: Rows that go through the suffix at once.

    Returns:
        α, float32 [B, T, D]
    """
    alpha = torch.full_like(h, START)
    if not h.numel():
        return alpha
    optimizer = torch.optim.Adam([alpha], lr=schedule.lr)
    elements = h[0].numel()
    for copies in schedule.copies:
        slope = (schedule.beta / elements) * capacity_slope(h, alpha, schedule.sigma)
        rows = [(image, copy) for image in range(len(h)) for copy in range(copies)]
        drawn: dict[int, Tensor] = {}
        for start in range(0, len(rows), in_flight):
            images = sorted({image for image, _ in rows[start : start + in_flight]})
            for image in images:
                if image not in drawn:
                    drawn = {image: _drawn(noise, image, copies, schedule.antithetic), **{k: v for k, v in drawn.items() if k >= images[0]}}
            part = rows[start : start + in_flight]
            _add_cosine_slope(slope, h, alpha, text, suffix, part, drawn, copies, schedule.sigma)
        alpha.grad = slope
        optimizer.step()
    return alpha


def _drawn(noise: Noise, image: int, copies: int, antithetic: bool) -> Tensor:
    if not antithetic or copies == 1:
        return noise(image, copies)
    half = noise(image, (copies + 1) // 2)
    return torch.stack([half, -half], 1).flatten(0, 1)[:copies]


def _add_cosine_slope(slope: Tensor, h: Tensor, alpha: Tensor, text: Tensor, suffix: Suffix, rows: list[tuple[int, int]], drawn: dict[int, Tensor], copies: int,
                      sigma: float) -> None:
    """Add the derivative of −mean cosine in α of some (image, copy) pairs, in place."""
    images = [image for image, _ in rows]
    eps = torch.stack([drawn[image][copy] for image, copy in rows])
    if sigma != 1:
        eps.mul_(sigma)
    kept = torch.sigmoid(alpha)
    z = torch.lerp(eps, h[images], kept[images]).requires_grad_()
    with torch.enable_grad():
        cosine = F.cosine_similarity(text[images], suffix(z), dim=-1, eps=COSINE_EPS).sum()
        (gradient,) = torch.autograd.grad(cosine, z)
    # dz/dα = λ (1 − λ) (h − σ ε); rows of one image follow each other
    gradient.mul_(h[images].sub_(eps)).mul_(-1.0 / copies)
    for image in sorted(set(images)):
        first, last = images.index(image), len(images) - images[::-1].index(image)
        slope[image] += gradient[first:last].sum(0) * (kept[image] * torch.sigmoid(-alpha[image]))
