"""The target and the loss: patches normalised one by one, squared error on the hidden ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mwm.ops import has_kernel, patch_loss

#: Added to a patch's variance before the square root (the paper's value).
EPSILON = 1e-6
#: Standard deviation below which a patch counts as near-constant in the logs when `min_std` is 0, and the value to
#: use for `min_std`: in units of the images' own standard deviation, as `mwm pretrain` feeds them. Of the 32-pixel
#: patches at 224 pixels, 28 % of brain MRI, 29 % of chest CT and 1 % of chest X-rays lie below (200 images each).
RECOMMENDED_MIN_STD = 0.05


class LossTerms(NamedTuple):
    """Sums over a batch from which the loss, also over several processes, and its logs follow.

    A patch's error is its squared error averaged over pixels and channels. `total / hidden` is the loss. Where patches have weights, an error
    is multiplied by its patch's weight, and `hidden` is the sum of the weights: the weights in the loss are w / mean(w), whose mean over the hidden patches
    that count (of all images and processes of the batch) is 1.

    Attributes:
        total: sum of the (weighted) errors of the hidden patches that count. Carries the graph. []
        hidden: number of hidden patches that count, or the sum of their weights. []
        flat_total: sum of the (weighted) errors of the hidden near-constant patches, whether they count or not. []
        flat_hidden: number of hidden near-constant patches, whether they count or not. []
    """

    total: Tensor
    hidden: Tensor
    flat_total: Tensor
    flat_hidden: Tensor

    def mean(self) -> Tensor:
        """The loss: (weighted) mean error over the hidden patches that count; 0 where there is none. []"""
        return self.total / divisor(self.hidden)


def divisor(hidden: Tensor) -> Tensor:
    """What a sum of errors is divided by: the number of patches or sum of weights, 1 where that is 0."""
    return torch.where(hidden > 0, hidden, 1)


def split_patches(images: Tensor, patch_size: int) -> Tensor:
    """View images as patches.

    Args:
        images: [B, C, H, W]
        patch_size: edge of a patch, pixels; divides H and W.

    Returns:
        A view. [B, C, Gh, p, Gw, p]
    """
    batch, channels, height, width = images.shape
    return images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)


def patch_moments(images: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (population) of each patch over its pixels and channels.

    Args:
        images: float. [B, C, H, W]
        patch_size: edge of a patch, pixels.

    Returns:
        Mean and variance, each broadcastable against `split_patches`. [B, 1, Gh, 1, Gw, 1]
    """
    patches = split_patches(images, patch_size)
    if not len(images):  # torch warns of a variance over no image
        none = patches.sum((1, 3, 5), keepdim=True)
        return none, none
    variance, mean = torch.var_mean(patches, dim=(1, 3, 5), correction=0, keepdim=True)
    return mean, variance


def masked_patch_loss(predicted: Tensor, images: Tensor, active: Tensor, patch_size: int, min_std: float = 0.0, weight: Tensor | None = None) -> LossTerms:
    """Squared error against per-patch-normalised pixels, summed over the hidden patches.

    error[b, i, j] = mean over pixels and channels of (predicted - (image - mean) / sqrt(variance + 1e-6))^2, with the
    mean and variance of patch (i, j); a patch counts when it is hidden and sqrt(variance) >= min_std.

    Args:
        predicted: the decoder's output, in units of normalised patches; half types are computed in float32.
            [B, C, H, W]
        images: the target, same units as the encoder's input. [B, C, H, W]
        active: bool, True = visible. [B, Gh, Gw]
        patch_size: edge of a patch, pixels.
        min_std: patches whose standard deviation is below are left out; 0 keeps all (the paper).
        weight: how much each patch counts, at least 0, relative to the others; None, or the same everywhere: all alike. A
            weight of 1 everywhere gives the bits of None where no kernel is used. float [B, Gh, Gw]

    Returns:
        The sums; `LossTerms.mean()` is the loss.

    Source: Mask What Matters (arXiv 2509.23054), method; per-patch targets after MAE (arXiv 2111.06377), §4.
    """
    if weight is None and _fused(predicted, images):
        flat_std = min_std or RECOMMENDED_MIN_STD
        return LossTerms(*patch_loss(predicted, images, active, patch_size, min_std=min_std, flat_std=flat_std, eps=EPSILON).unbind())
    kind = torch.promote_types(torch.float32, images.dtype)
    images, predicted = images.to(kind), predicted.to(kind)
    mean, variance = patch_moments(images, patch_size)
    target = (split_patches(images, patch_size) - mean) * torch.rsqrt(variance + EPSILON)
    error = (split_patches(predicted, patch_size) - target).square().mean(dim=(1, 3, 5))
    deviation = variance.sqrt().view_as(error)
    flat = ~active & (deviation < (min_std or RECOMMENDED_MIN_STD))
    counted = ~active & (deviation >= min_std)
    zero = error.new_zeros(())
    if weight is not None:
        weight = weight.to(error)
        error = error * weight
    number = counted.sum().to(kind) if weight is None else torch.where(counted, weight, zero).sum()
    return LossTerms(torch.where(counted, error, zero).sum(), number,
                     torch.where(flat, error.detach(), zero).sum(), flat.sum().to(kind))


def _fused(predicted: Tensor, images: Tensor) -> bool:
    """Whether one kernel does it: on a GPU, eagerly; inductor fuses the lines below, and on a CPU torch's own are as fast."""
    if torch.compiler.is_compiling() or predicted.device.type != "cuda" or images.requires_grad or images.dtype == torch.float64:
        return False
    return has_kernel("patch_loss", predicted)


def hidden_patch_loss(predicted: Tensor, patches: Tensor, min_std: float = 0.0, weight: Tensor | None = None) -> LossTerms:
    """`masked_patch_loss` where only the hidden patches are at hand: the same sums, to rounding.

    Args:
        predicted: the decoder's output at the hidden patches. [T, C, p, p]
        patches: the same patches of the images. [T, C, p, p]
        min_std: as in `masked_patch_loss`.
        weight: of each of these patches. float [T]

    Returns:
        The sums; `LossTerms.mean()` is the loss.
    """
    hidden = torch.zeros((len(patches), 1, 1), dtype=torch.bool, device=patches.device)
    return masked_patch_loss(predicted, patches, hidden, patches.shape[-1], min_std, None if weight is None else weight.view(-1, 1, 1))


def restore_patches(predicted: Tensor, images: Tensor, active: Tensor, patch_size: int) -> Tensor:
    """Predicted patches brought back to the image's units and set into the hidden places.

    Args:
        predicted: the decoder's output, in units of normalised patches. [B, C, H, W]
        images: the full images; a hidden patch's own mean and deviation undo the normalisation. [B, C, H, W]
        active: bool, True = visible. [B, Gh, Gw]
        patch_size: edge of a patch, pixels.

    Returns:
        The images where visible, the prediction where hidden. [B, C, H, W]
    """
    mean, variance = patch_moments(images, patch_size)
    restored = split_patches(predicted.to(images.dtype), patch_size) * torch.sqrt(variance + EPSILON) + mean
    keep = active[:, None, :, None, :, None]
    return torch.where(keep, split_patches(images, patch_size), restored).reshape(images.shape)
