"""The loss against a loop over patches, and what it must not look at."""

from __future__ import annotations

import pytest
import torch

from mwm.mim.loss import RECOMMENDED_MIN_STD, masked_patch_loss, restore_patches


def _case(channels: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    images, predicted = torch.randn(2, channels, 24, 16, dtype=torch.float64), torch.randn(2, channels, 24, 16, dtype=torch.float64)
    active = torch.rand(2, 3, 2) < 0.5
    active[0, 0, 0], active[0, 0, 1] = True, False
    return images, predicted, active


@pytest.mark.parametrize("channels", [1, 3])
def test_loss_equals_a_loop_over_hidden_patches(channels: int) -> None:
    images, predicted, active = _case(channels)
    errors = []
    for b, i, j in (~active).nonzero().tolist():
        window = (b, slice(None), slice(8 * i, 8 * i + 8), slice(8 * j, 8 * j + 8))
        patch = images[window]
        target = (patch - patch.mean()) / (patch.var(correction=0) + 1e-6).sqrt()
        errors.append((predicted[window] - target).square().mean())
    terms = masked_patch_loss(predicted, images, active, 8)
    torch.testing.assert_close(terms.mean(), torch.stack(errors).mean(), rtol=1e-12, atol=0)
    assert terms.hidden == len(errors)


def test_visible_patches_have_no_part_in_the_loss() -> None:
    images, predicted, active = _case()
    predicted.requires_grad_()
    masked_patch_loss(predicted, images, active, 8).mean().backward()
    visible = active.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(predicted)
    assert predicted.grad[visible].abs().max() == 0
    assert predicted.grad[~visible].abs().min() > 0


def test_loss_does_not_change_with_a_patchs_brightness_and_contrast() -> None:
    images, predicted, active = _case()
    one, two = (masked_patch_loss(predicted, x, active, 8).mean() for x in (images, 50 * images + 7))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=0)  # not exact: epsilon weighs less


def test_min_std_leaves_flat_patches_out_and_logs_their_share() -> None:
    images, predicted, active = _case()
    images[0, :, :8, 8:] = 0.25  # the hidden patch (0, 0, 1)
    paper, ours = (masked_patch_loss(predicted, images, active, 8, s) for s in (0.0, RECOMMENDED_MIN_STD))
    hidden = int((~active).sum())
    assert (paper.hidden, ours.hidden) == (hidden, hidden - 1)
    assert paper.flat_hidden == ours.flat_hidden == 1
    torch.testing.assert_close(paper.total, ours.total + ours.flat_total)
    torch.testing.assert_close(ours.flat_total, predicted[0, :, :8, 8:].square().mean())


def test_loss_is_zero_with_zero_gradient_where_nothing_is_hidden() -> None:
    images, predicted, active = _case()
    predicted.requires_grad_()
    loss = masked_patch_loss(predicted, images, torch.ones_like(active), 8).mean()
    loss.backward()
    assert loss == 0
    assert predicted.grad.abs().max() == 0


def test_an_empty_batch_gives_no_loss_and_no_warning() -> None:
    predicted = torch.zeros(0, 1, 8, 12, requires_grad=True)
    terms = masked_patch_loss(predicted, torch.zeros(0, 1, 8, 12), torch.zeros(0, 2, 3, dtype=torch.bool), 4)
    terms.mean().backward()
    assert terms.mean().item() == 0.0 and terms.hidden.item() == 0.0 and predicted.grad.shape == predicted.shape


def test_half_precision_predictions_give_a_float32_loss() -> None:
    images, predicted, active = _case()
    assert masked_patch_loss(predicted.bfloat16(), images.float(), active, 8).mean().dtype == torch.float32


def test_restoring_the_exact_target_gives_the_image_back() -> None:
    images, _, active = _case()
    patches = images.view(2, 3, 3, 8, 2, 8)
    variance, mean = torch.var_mean(patches, dim=(1, 3, 5), correction=0, keepdim=True)
    target = ((patches - mean) / (variance + 1e-6).sqrt()).view_as(images)
    torch.testing.assert_close(restore_patches(target, images, active, 8), images)
