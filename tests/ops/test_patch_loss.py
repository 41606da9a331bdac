"""The loss of masked image modelling as one op: two derivations, and what it must not look at."""

from __future__ import annotations

import harness
import pytest
import torch
from torch import Tensor

from mwm import ops
from mwm.ops import reference

MASKS = harness.masks()


def _case(name: str, channels: int, edge: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    active = MASKS[name]
    shape = (active.shape[0], channels, active.shape[1] * edge, active.shape[2] * edge)
    images = torch.randn(shape, dtype=dtype)
    if images.numel():
        images[0, :, :edge, :edge] = 0.25  # flat
    return torch.randn(shape, dtype=dtype), images, active


def _op(active: Tensor, images: Tensor, edge: int, backend: str | None, **settings: float):
    return lambda predicted: ops.patch_loss(predicted, images.to(predicted.dtype), active, edge, **settings, backend=backend)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("channels", "edge"), [(1, 4), (3, 5), (2, 1)])
def test_sums_and_gradients_equal_the_oracle(name: str, channels: int, edge: int) -> None:
    predicted, images, active = _case(name, channels, edge)
    settings = {"min_std": 0.05, "flat_std": 0.3}

    def oracle(p: Tensor) -> Tensor:
        return reference.patch_loss(p, images.to(p.dtype), active, edge, 0.05, 0.3, 1e-6)

    harness.check(_op(active, images, edge, "cpu", **settings), oracle, [predicted])
    harness.check(_op(active, images, edge, "reference", **settings), oracle, [predicted])


def test_visible_patches_have_no_part_in_it() -> None:
    predicted, images, active = _case("mixed", 2, 4)
    seen = reference.spread(active, 4).expand_as(images)
    for backend in ("cpu", "reference"):
        leaf = torch.where(seen, torch.nan, predicted).requires_grad_()
        sums = ops.patch_loss(leaf, torch.where(seen, torch.nan, images), active, 4, backend=backend)
        (grad,) = torch.autograd.grad(sums[0], leaf)
        assert torch.isfinite(sums).all()
        assert torch.equal(grad == 0, seen)


def test_only_the_first_sum_carries_a_gradient() -> None:
    predicted, images, active = _case("mixed", 2, 4)
    leaf = predicted.requires_grad_()
    (grad,) = torch.autograd.grad(ops.patch_loss(leaf, images, active, 4, flat_std=9.0)[2], leaf)
    assert not grad.any()


def test_gradcheck_and_a_clear_error_for_the_second_derivative() -> None:
    predicted, images, active = _case("checkerboard", 2, 2)
    assert torch.autograd.gradcheck(lambda p: ops.patch_loss(p, images, active, 2)[0], predicted.requires_grad_())
    (grad,) = torch.autograd.grad(ops.patch_loss(predicted, images, active, 2)[0], predicted, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck itself asks for it
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str) -> None:
    predicted, images, active = _case("mixed", 2, 4, torch.float32)
    torch.library.opcheck(torch.ops.mwm.patch_loss.default, (predicted.requires_grad_(), images, active, 4, 0.1, 0.2, 1e-6, backend))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"active": torch.zeros(2, 2, 2)}, TypeError, "active must be bool"),
        ({"predicted": torch.zeros(2, 1, 8, 4)}, ValueError, r"predicted must be \[B, C, H, W\] = \[2, 1, 8, 8\]"),
        ({"images": torch.zeros(2, 3, 8, 8)}, ValueError, r"images must be .* got \[2, 3, 8, 8\]"),
        ({"images": torch.zeros(2, 1, 8, 8, requires_grad=True)}, ValueError, "images must not require a gradient"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change: dict, error: type, message: str) -> None:
    settings = {"predicted": torch.zeros(2, 1, 8, 8), "images": torch.zeros(2, 1, 8, 8), "active": torch.zeros(2, 2, 2, dtype=torch.bool)} | change
    with pytest.raises(error, match=message):
        ops.patch_loss(**settings, patch_size=4)
