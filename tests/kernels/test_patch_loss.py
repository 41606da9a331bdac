"""The loss of masked image modelling in Triton, against the oracle."""

from __future__ import annotations

import harness
import pytest
import torch
from torch import Tensor

from mwm import ops
from mwm.ops import reference

MASKS = harness.masks()


def _case(name: str, channels: int, edge: int) -> tuple[Tensor, Tensor, Tensor]:
    active = MASKS[name]
    shape = (active.shape[0], channels, active.shape[1] * edge, active.shape[2] * edge)
    images = 2 + torch.randn(shape, dtype=torch.float64)
    if images.numel():
        images[0, :, :edge, :edge] = 0.25  # flat
    return torch.randn(shape, dtype=torch.float64), images, active


@pytest.mark.parametrize(("name", "channels", "edge", "dtype"), [
    *((name, 2, 3, torch.float32) for name in MASKS if name != "square 7"), ("mixed", 1, 4, torch.float16), ("checkerboard", 3, 8, torch.float32),
    ("single tile", 1, 72, torch.float32),
])
def test_sums_and_gradients_equal_the_oracle(name: str, channels: int, edge: int, dtype: torch.dtype, device: str) -> None:
    predicted, images, active = _case(name, channels, edge)
    target = images.to(torch.float32)

    def op(p: Tensor) -> Tensor:
        sums = ops.patch_loss(p.to(device), target.to(device), active.to(device), edge, min_std=0.05, flat_std=0.3, backend="triton")
        return sums.cpu()

    def oracle(p: Tensor) -> Tensor:
        return reference.patch_loss(p, target.to(torch.promote_types(p.dtype, torch.float32)), active, edge, 0.05, 0.3, 1e-6)

    harness.check(op, oracle, [predicted], dtype=dtype, threads=(1,))


def test_bfloat16_predictions_and_targets_are_read_as_they_are(device: str) -> None:
    predicted, images, active = (x.bfloat16() if x.is_floating_point() else x for x in _case("mixed", 3, 4))
    leaf = predicted.to(device).requires_grad_()
    sums = ops.patch_loss(leaf, images.to(device), active.to(device), 4, min_std=0.05, flat_std=0.3, backend="triton")
    truth = predicted.double().requires_grad_()
    want = reference.patch_loss(truth, images.double(), active, 4, 0.05, 0.3, 1e-6)
    torch.testing.assert_close(sums.double().cpu(), want, rtol=1e-5, atol=0)
    (grad,), (wanted,) = torch.autograd.grad(sums[0], leaf), torch.autograd.grad(want[0], truth)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad.cpu().double(), wanted, rtol=0.008, atol=1e-7)


def test_visible_patches_have_no_part_in_it(device: str) -> None:
    predicted, images, active = _case("mixed", 2, 4)
    seen = reference.spread(active, 4).expand_as(images)
    leaf = torch.where(seen, torch.nan, predicted).float().to(device).requires_grad_()
    sums = ops.patch_loss(leaf, torch.where(seen, torch.nan, images).float().to(device), active.to(device), 4, backend="triton")
    (grad,) = torch.autograd.grad(sums[0], leaf)
    assert torch.isfinite(sums).all()
    assert torch.equal(grad.cpu() == 0, seen)


def test_any_strides_give_the_same_sums_and_gradients(device: str) -> None:
    predicted, images, active = _case("mixed", 3, 4)
    predicted, images, active = predicted.float().to(device), images.float().to(device), active.to(device)

    def both(p: Tensor, x: Tensor, a: Tensor) -> list[Tensor]:
        leaf = p.detach().requires_grad_()
        sums = ops.patch_loss(leaf, x, a, 4, flat_std=0.5, backend="triton")
        return [sums, torch.autograd.grad(sums[0], leaf)[0]]

    expected = both(predicted, images, active)
    last = torch.channels_last
    other = both(predicted.contiguous(memory_format=last), images.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0), active.flip(1).flip(1))
    assert torch.equal(expected[0], other[0]) and torch.equal(expected[1], other[1])
    wide = both(predicted.repeat_interleave(2, 3)[..., ::2], images, active.repeat_interleave(2, 2)[..., ::2])
    assert torch.equal(expected[0], wide[0]) and torch.equal(expected[1], wide[1])
