"""DHN-NCE against the formula written out with loops, and the released code's other function against its description."""

from __future__ import annotations

import math

import pytest
import torch

from mwm.localize.dhn_nce import dhn_nce


def cosines(batch: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    images, texts = (torch.nn.functional.normalize(torch.randn(batch, 8, generator=draw, dtype=torch.float64), dim=1) for _ in range(2))
    return images @ texts.T


def written_out(s: torch.Tensor, temperature: float, beta_image: float, beta_text: float) -> float:
    """The paper's formula, term by term, in Python floats."""
    count, total = len(s), 0.0
    for rows, beta in ((s.tolist(), beta_image), (s.T.tolist(), beta_text)):
        for i, row in enumerate(rows):
            others = [j for j in range(count) if j != i]
            normaliser = sum(math.exp(beta * row[k] / temperature) for k in others)
            pushed = sum((count - 1) * math.exp(beta * row[j] / temperature) / normaliser * math.exp(row[j] / temperature) for j in others)
            total += (-row[i] / temperature + math.log(pushed)) / count
    return total


@pytest.mark.parametrize("batch", [2, 3, 7])
@pytest.mark.parametrize("settings", [(0.6, 0.15, 0.15), (0.07, 1.0, 0.0), (0.6, 0.0, 0.5)])
def test_loss_is_the_formula(batch: int, settings: tuple[float, float, float]) -> None:
    s = cosines(batch)
    temperature, beta_image, beta_text = settings
    assert float(dhn_nce(s, temperature=temperature, beta_image=beta_image, beta_text=beta_text)) == pytest.approx(written_out(s, *settings), rel=1e-5, abs=1e-5)


def test_without_hardness_it_is_infonce_with_the_positive_out_of_the_denominator() -> None:
    s = cosines(5) / 0.6
    away = s.masked_fill(torch.eye(5, dtype=torch.bool), -math.inf)
    plain = (away.logsumexp(1) - s.diagonal() + away.logsumexp(0) - s.diagonal()).mean()
    assert float(dhn_nce(cosines(5), beta_image=0, beta_text=0)) == pytest.approx(float(plain), rel=1e-5)


def test_equal_captions_are_no_negatives_and_a_row_without_negatives_counts_its_positive() -> None:
    s = cosines(4)
    same = torch.eye(4, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    moved = s.clone()
    moved[0, 1] = moved[1, 0] = 0.9
    assert float(dhn_nce(s, same=same)) == pytest.approx(float(dhn_nce(moved, same=same)), rel=1e-6)
    assert float(dhn_nce(s, same=torch.eye(4, dtype=torch.bool))) == pytest.approx(float(dhn_nce(s)), rel=1e-6)
    everything = dhn_nce(s, same=torch.ones(4, 4, dtype=torch.bool))
    assert float(everything) == pytest.approx(-2 * float(s.diagonal().mean()) / 0.6, rel=1e-5)


def test_gradient_pulls_pairs_together_and_pushes_near_negatives_harder() -> None:
    s = torch.tensor([[0.5, 0.4, -0.5], [0.1, 0.5, 0.0], [0.1, 0.0, 0.5]], requires_grad=True)
    dhn_nce(s, temperature=0.2, beta_image=1.0, beta_text=0.0).backward()
    assert bool((s.grad.diagonal() < 0).all()) and s.grad[0, 1] > s.grad[0, 2] > -1e-3 and bool(torch.isfinite(s.grad).all())


def test_numbers_stay_finite_at_low_temperature() -> None:
    s = cosines(6).float().requires_grad_(True)
    loss = dhn_nce(s, temperature=1e-3)
    loss.backward()
    assert bool(torch.isfinite(loss)) and bool(torch.isfinite(s.grad).all())


def test_released_function_is_what_its_description_says() -> None:
    """systems: mean over all entries, diagonal replaced by 0, normaliser without beta."""
    s, b = cosines(5) / 0.6, 5
    rest = s.clone()
    rest.fill_diagonal_(0)
    total = 0.0
    for i in range(b):
        for j in range(b):
            z_image = math.log(sum(math.exp(float(v)) for v in rest[j]))
            z_text = math.log(sum(math.exp(float(v)) for v in rest[:, j]))
            total += (2 * math.log(b - 1) + 1.15 * float(rest[i, j]) + 1.15 * float(rest[j, i]) - z_image - z_text) / b**2
    total -= 2 / b**2 * float(s.diagonal().sum())
    released = float(dhn_nce(cosines(5), reference_bug=True))
    assert released == pytest.approx(total, rel=1e-5) and abs(released - float(dhn_nce(cosines(5)))) > 0.1


@pytest.mark.parametrize(("similarity", "settings"), [(torch.zeros(1, 1), {}), (torch.zeros(2, 3), {}), (torch.zeros(4), {}), (torch.zeros(3, 3), {"temperature": 0}),
                                                      (torch.zeros(3, 3), {"beta_text": -1})])
def test_bad_arguments_are_refused(similarity: torch.Tensor, settings: dict) -> None:
    with pytest.raises(ValueError, match="dhn_nce: "):
        dhn_nce(similarity, **settings)
