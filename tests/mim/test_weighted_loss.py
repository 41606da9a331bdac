"""Patches that count more than others in the loss."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # import-mode importlib does not; dense_twin.py is shared
import dense_twin

import mwm
from mwm.mim import MaskedImageModel
from mwm.mim.loss import hidden_patch_loss, masked_patch_loss


def _case(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    images, predicted = torch.randn(3, 2, 24, 16, dtype=dtype), torch.randn(3, 2, 24, 16, dtype=dtype)
    active = torch.rand(3, 3, 2) < 0.4
    active[0, 0, 0], active[0, 0, 1] = True, False
    images[1, :, :8, :8] = 0.1
    active[1, 0, 0] = False  # a flat hidden patch
    return images, predicted, active, torch.rand(3, 3, 2, dtype=dtype) * 3


def _model(decode: str = "dense") -> MaskedImageModel:
    torch.manual_seed(0)
    return MaskedImageModel(mwm.sparsify(dense_twin.ToyNet()), patch_size=8, decoder_width=16, min_std=0.05, decode=decode)


@pytest.mark.parametrize("min_std", [0.0, 0.05])
def test_loss_is_the_weighted_mean_of_a_loop_over_patches(min_std: float) -> None:
    images, predicted, active, weight = _case()
    total = weights = number = 0
    for b, i, j in (~active).nonzero().tolist():
        window = (b, slice(None), slice(8 * i, 8 * i + 8), slice(8 * j, 8 * j + 8))
        patch = images[window]
        if patch.std(correction=0) < min_std:
            continue
        target = (patch - patch.mean()) / (patch.var(correction=0) + 1e-6).sqrt()
        total, weights, number = total + weight[b, i, j] * (predicted[window] - target).square().mean(), weights + weight[b, i, j], number + 1
    terms = masked_patch_loss(predicted, images, active, 8, min_std, weight)
    torch.testing.assert_close(terms.mean(), total / weights, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms.hidden, weights, rtol=1e-12, atol=0)
    assert number < int((~active).sum()) or not min_std
    scaled = masked_patch_loss(predicted, images, active, 8, min_std, 0.01 * weight)  # only ratios matter: the mean weight is 1
    torch.testing.assert_close(scaled.mean(), terms.mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("min_std", [0.0, 0.05])
def test_weight_one_gives_the_bits_of_no_weight(dtype: torch.dtype, min_std: float) -> None:
    images, predicted, active, _ = _case(torch.float32)
    results = []
    for weight in (None, torch.ones(3, 3, 2)):
        guess = predicted.to(dtype).requires_grad_()
        terms = masked_patch_loss(guess, images, active, 8, min_std, weight)
        terms.mean().backward()
        results.append([*terms, guess.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_is_that_of_finite_differences_and_zero_where_weights_are() -> None:
    images, predicted, active, weight = _case()
    weight[0, 0, 1] = 0.0
    predicted = predicted[:1].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: masked_patch_loss(x, images[:1], active[:1], 8, 0.0, weight[:1]).mean(), predicted)
    masked_patch_loss(predicted, images[:1], active[:1], 8, 0.0, weight[:1]).mean().backward()
    assert not predicted.grad[0, :, :8, 8:].any() and predicted.grad.any()


def test_no_weight_on_anything_hidden_gives_zero_not_nan() -> None:
    images, predicted, active, weight = _case()
    predicted.requires_grad_()
    loss = masked_patch_loss(predicted, images, active, 8, 0.0, torch.where(active, weight, 0.0)).mean()
    loss.backward()
    assert loss == 0 and not predicted.grad.any()


def test_hidden_patches_alone_give_the_same_sums() -> None:
    images, predicted, active, weight = _case()
    cut = [x.view(3, 2, 3, 8, 2, 8).permute(0, 2, 4, 1, 3, 5)[~active] for x in (predicted, images)]
    torch.testing.assert_close(torch.stack(hidden_patch_loss(*cut, 0.05, weight[~active])), torch.stack(masked_patch_loss(predicted, images, active, 8, 0.05, weight)))


@pytest.mark.parametrize("decode", ["dense", "hidden"])
@pytest.mark.parametrize("half", [False, True])
def test_a_models_loss_takes_weights_in_both_ways_of_decoding(decode: str, half: bool) -> None:
    model = _model(decode)
    images, _, active, weight = _case(torch.float32)
    losses = []
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        for chosen in (None, torch.ones(3, 3, 2), weight):
            model.zero_grad(set_to_none=True)
            loss = model(images, active, weight=chosen)
            loss.backward()
            losses.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
        terms = model(images, active, weight=weight, reduction="sum")
        predicted = model.predict(images, active)
    assert torch.equal(losses[0][0], losses[1][0]) and all(torch.equal(a, b) for a, b in zip(losses[0][1], losses[1][1], strict=True))
    assert losses[2][0].dtype == torch.float32 and not torch.equal(losses[0][0], losses[2][0])
    torch.testing.assert_close(terms.total / terms.hidden, losses[2][0])
    by_hand = masked_patch_loss(predicted, images, active, 8, 0.05, weight).mean()
    torch.testing.assert_close(by_hand, losses[2][0], rtol=1e-2 if half else 1e-5, atol=0)


@pytest.mark.parametrize(("weight", "words"), [
    (torch.ones(3, 3, 3), r"weight must be float \[3, 3, 2\]"), (torch.ones(3, 3, 2, dtype=torch.bool), "weight must be float"),
    (torch.full((3, 3, 2), -1.0), "at least 0"), (torch.full((3, 3, 2), float("nan")), "at least 0"),
])
def test_wrong_weights_are_refused(weight: torch.Tensor, words: str) -> None:
    images, _, active, _ = _case(torch.float32)
    with pytest.raises(ValueError, match=words) as caught:
        _model()(images, active, weight=weight)
    assert "\n" not in str(caught.value)
