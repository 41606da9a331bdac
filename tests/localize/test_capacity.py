"""The information bottleneck's formulas against autograd, the distributions they stand for, and the authors' procedure."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mwm.localize.capacity import Schedule, capacity, capacity_slope, optimise


@pytest.mark.parametrize("sigma", [1.0, 0.4, 3.0])
def test_capacity_is_the_divergence_of_the_noisy_activation_from_the_prior(sigma: float) -> None:
    h, alpha = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    kept = torch.sigmoid(alpha)
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(kept * h, (1 - kept) * sigma), torch.distributions.Normal(0 * h, sigma + 0 * h))
    assert torch.allclose(capacity(h, alpha, sigma), expected, rtol=1e-9)


@pytest.mark.parametrize("sigma", [1.0, 0.4])
def test_slope_is_the_derivative_of_the_capacity(sigma: float) -> None:
    h, alpha = torch.randn(2, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 4
    alpha.requires_grad_()
    (expected,) = torch.autograd.grad(capacity(h, alpha, sigma).sum(), alpha)
    assert torch.allclose(capacity_slope(h, alpha.detach(), sigma), expected, rtol=1e-9)


def test_capacity_stays_finite_where_the_authors_form_does_not() -> None:
    """1 − sigmoid(α) is 0 in float32 from about α = 17 on."""
    alpha, h = torch.tensor([17.0, 40.0, 200.0, -200.0]), torch.tensor([1.0, -2.0, 3.0, 4.0])
    kept = torch.sigmoid(alpha)
    assert torch.isinf(0.5 * ((kept * h) ** 2 + (1 - kept) ** 2 - 1 - ((1 - kept) ** 2).log())).any()
    assert torch.isfinite(capacity(h, alpha)).all() and torch.isfinite(capacity_slope(h, alpha)).all()


def network(z: Tensor) -> Tensor:
    """A stand-in for the rest of a network: [N, T, D] → [N, D]"""
    return torch.tanh(z * 1.3 + z.roll(1, 1)).mean(1) + 0.1 * z[:, 0] ** 2


def by_autograd(h: Tensor, text: Tensor, schedule: Schedule, noise: list[Tensor]) -> Tensor:
    """The same optimisation, with everything left to autograd and torch's Adam, one image."""
    alpha = torch.nn.Parameter(torch.full_like(h, 5.0))
    optimizer = torch.optim.Adam([alpha], lr=schedule.lr)
    for eps in noise:
        kept = torch.sigmoid(alpha)
        z = kept * h + (1 - kept) * schedule.sigma * eps
        loss = schedule.beta * capacity(h, alpha, schedule.sigma).mean() - torch.cosine_similarity(text.expand(len(eps), -1), network(z), dim=-1, eps=1e-6).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return alpha.detach()


@pytest.mark.parametrize(("copies", "sigma", "antithetic"), [((3,) * 5, 1.0, False), ((1, 2, 4), 0.5, False), ((2, 3), 1.0, True)])
@pytest.mark.parametrize("in_flight", [1, 4, 100])
def test_written_down_gradients_give_the_alpha_of_autograd_for_any_chunks(copies: tuple[int, ...], sigma: float, antithetic: bool, in_flight: int) -> None:
    generator = torch.Generator().manual_seed(2)
    h, text = torch.randn(3, 5, 4, generator=generator), torch.randn(3, 4, generator=generator)
    schedule = Schedule(copies, lr=0.7, beta=0.3, sigma=sigma, antithetic=antithetic)
    drawn: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
    sources = [torch.Generator().manual_seed(10 + k) for k in range(3)]

    def noise(image: int, count: int) -> Tensor:
        drawn[image].append(torch.randn(count, 5, 4, generator=sources[image]))
        return drawn[image][-1]

    ours = optimise(h, text, network, schedule, noise, in_flight)
    for image in range(3):
        used = drawn[image]
        assert len(used) == len(copies)  # once per step, whatever the chunks
        if antithetic:
            used = [torch.stack([half, -half], 1).flatten(0, 1)[:count] for half, count in zip(used, copies, strict=True)]
        assert torch.allclose(ours[image], by_autograd(h[image], text[image : image + 1], schedule, used), atol=2e-4)


def test_nothing_to_optimise_gives_nothing() -> None:
    assert optimise(torch.zeros(0, 5, 4), torch.zeros(0, 4), network, Schedule((1,)), lambda image, count: torch.zeros(count, 5, 4), 4).shape == (0, 5, 4)
