"""Squared error against patches normalised one by one, summed over the hidden ones: the loss of masked image modelling in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gpu, reference
from .backend import FLOATS, GPU_FLOATS, declare, resolve
from .registry import once_only, register

declare("patch_loss", cpu=FLOATS, triton=GPU_FLOATS, reference=FLOATS)


def patch_loss(
    predicted: Tensor,
    images: Tensor,
    active: Tensor,
    patch_size: int,
    *,
    min_std: float = 0.0,
    flat_std: float = 0.0,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Sum, over the hidden patches, the squared error against the patch normalised by its own mean and deviation.

    error[b, i, j] = mean over pixels and channels of (predicted - (image - mean) / sqrt(variance + eps))^2, with the mean and
    variance (population) of patch (i, j). A patch counts when it is hidden and sqrt(variance) >= min_std; it is flat when it
    is hidden and sqrt(variance) < flat_std.

    Args:
        predicted: In units of normalised patches. float32 | bfloat16 | float16 | float64, any strides [B, C, H, W]
        images: The target; may have another dtype. [B, C, H, W]
        active: True where a patch is visible. bool [B, Gh, Gw]
        patch_size: Edge of a patch in pixels, H // Gh and W // Gw.
        min_std, flat_std: Deviations, in units of the images.
        eps: Added to the variance.
        backend: Forces an implementation; None picks the best. "cpu" is torch's own arithmetic with this op's derivative.

    Returns:
        Error of the patches that count, their number, error of the flat patches, their number. float32 (float64 for float64) [4]

    Raises:
        TypeError: `active` is not bool.
        ValueError: A shape does not fit, or `images` requires a gradient.
        BackendError: `backend` cannot run this input; the message lists the reasons.

    Differentiable once in predicted, through the first sum alone. Deterministic. Computed in float32 (float64 for float64).

    Source: Mask What Matters (arXiv 2509.23054), method; per-patch targets after MAE (arXiv 2111.06377), §4.
    """
    if active.dtype != torch.bool or active.dim() != 3:
        raise TypeError(f"patch_loss: active must be bool [B, Gh, Gw], got {active.dtype} {list(active.shape)}. True means visible.")
    grid = [active.shape[0], predicted.shape[1], active.shape[1] * patch_size, active.shape[2] * patch_size] if predicted.dim() == 4 else None
    for name, tensor in (("predicted", predicted), ("images", images)):
        if list(tensor.shape) != grid:
            raise ValueError(f"patch_loss: {name} must be [B, C, H, W] = {grid or '[B, C, H, W]'} for patches of {patch_size} on the grid of active, "
                             f"got {list(tensor.shape)}.")
        if tensor.device != active.device:
            raise ValueError(f"patch_loss: {name} must lie on the device of active ({active.device}), got {tensor.device}. Move one of them.")
    if images.requires_grad:
        raise ValueError("patch_loss: images must not require a gradient, they are the target. Pass images.detach().")
    return _patch_loss(predicted, images, active, patch_size, float(min_std), float(flat_std), float(eps), backend or "")[0]


def _wide(predicted: Tensor, images: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (predicted.dtype, images.dtype) else torch.float32


def _fake(
    predicted: Tensor, images: Tensor, active: Tensor, patch_size: int, min_std: float, flat_std: float, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    wide = _wide(predicted, images)
    return predicted.new_empty(4, dtype=wide), predicted.new_empty((active.numel(), 4), dtype=wide)


def _name(backend: str, predicted: Tensor, images: Tensor) -> str:
    """The choice looks at predicted; a float64 target beside it is left to torch."""
    mixed = not backend and images.dtype == torch.float64 and predicted.device.type != "cpu"
    return "reference" if mixed else resolve("patch_loss", backend, predicted)


def _implementation(
    predicted: Tensor, images: Tensor, active: Tensor, patch_size: int, min_std: float, flat_std: float, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    sums, stats = _fake(predicted, images, active, patch_size, min_std, flat_std, eps, backend)
    name = _name(backend, predicted, images)
    if name == "reference":
        return sums.copy_(reference.patch_loss(predicted, images, active, patch_size, min_std, flat_std, eps)), stats.zero_()
    if name == "triton":
        with gpu.guard(predicted):
            gpu.triton_kernels("patch_loss").forward(
                predicted, images, gpu.as_bytes(active.contiguous()), patch_size, min_std, flat_std, eps, stats, sums
            )
        return sums, stats
    target, mean, scale, variance = _target(images.to(sums.dtype), active, patch_size, eps)
    error = (_patches(predicted.to(sums.dtype), active, patch_size) - target).square_().mean((3, 4, 5)).flatten()
    deviation, hidden = variance.sqrt().flatten(), ~active.flatten()
    counts, flat = hidden & (deviation >= min_std), hidden & (deviation < flat_std)
    for place, chosen in ((0, counts), (2, flat)):
        sums[place], sums[place + 1] = torch.where(chosen, error, 0).sum(), chosen.sum()
    columns = mean.flatten(), scale.flatten(), error, counts + 2 * flat.to(torch.int64)
    for column, values in enumerate(columns):
        stats[:, column] = values
    return sums, stats


def _patches(x: Tensor, active: Tensor, edge: int) -> Tensor:
    """[B, C, H, W] seen as [B, Gh, Gw, C, p, p]"""
    batch, rows, columns = active.shape
    return x.reshape(batch, x.shape[1], rows, edge, columns, edge).permute(0, 2, 4, 1, 3, 5)


def _target(images: Tensor, active: Tensor, edge: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(normalised patches, mean, 1 / deviation, variance), the last three [B, Gh, Gw, 1, 1, 1]"""
    patches = _patches(images, active, edge)
    mean = patches.mean((3, 4, 5), keepdim=True)
    centred = patches - mean
    variance = centred.square().mean((3, 4, 5), keepdim=True)
    scale = torch.rsqrt(variance + eps)
    return centred.mul_(scale), mean, scale, variance


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    predicted, images, active, patch_size, min_std, flat_std, eps, backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(predicted, images, active, output[1])
    ctx.settings = patch_size, min_std, flat_std, eps, backend


def _backward(ctx: Any, grad: Tensor, _stats: Any) -> tuple:
    found = _patch_loss_backward(grad, *ctx.saved_tensors, *ctx.settings) if ctx.needs_input_grad[0] else None
    return found, None, None, None, None, None, None, None


def _backward_fake(
    grad: Tensor, predicted: Tensor, images: Tensor, active: Tensor, stats: Tensor, patch_size: int, min_std: float, flat_std: float, eps: float, backend: str
) -> Tensor:
    return torch.empty_like(predicted)


def _backward_implementation(
    grad: Tensor, predicted: Tensor, images: Tensor, active: Tensor, stats: Tensor, patch_size: int, min_std: float, flat_std: float, eps: float, backend: str
) -> Tensor:
    out = torch.empty_like(predicted)
    name = _name(backend, predicted, images)
    if name == "reference":
        return out.copy_(reference.patch_loss_backward(grad[0], predicted, images, active, patch_size, min_std, eps))
    if name == "triton":
        with gpu.guard(predicted):
            _, rows, columns = active.shape
            gpu.triton_kernels("patch_loss").backward(grad.contiguous(), predicted, images, stats, rows, columns, patch_size, out)
        return out
    batch, rows, columns = active.shape
    mean, scale, _, code = stats.reshape(batch, rows, columns, 4, 1, 1, 1).unbind(3)
    target = (_patches(images.to(stats.dtype), active, patch_size) - mean) * scale
    slope = (_patches(predicted.to(stats.dtype), active, patch_size) - target).mul_(2 / max(target[0, 0, 0].numel(), 1) if target.numel() else 0.0)
    slope = torch.where((code == 1) | (code == 3), slope.mul_(grad[0]), 0)
    return out.copy_(slope.permute(0, 3, 1, 4, 2, 5).reshape(predicted.shape))


_patch_loss = register(
    "patch_loss",
    "(Tensor predicted, Tensor images, Tensor active, SymInt patch_size, float min_std, float flat_std, float eps, str backend) -> (Tensor, Tensor)",
    _implementation,
    _fake,
    setup_context=_setup,
    backward=_backward,
)
_patch_loss_backward = register(
    "patch_loss_backward",
    "(Tensor grad, Tensor predicted, Tensor images, Tensor active, Tensor stats, SymInt patch_size, float min_std, float flat_std, float eps, str backend)"
    " -> Tensor",
    _backward_implementation,
    _backward_fake,
    setup_context=lambda ctx, inputs, output: None,
    backward=once_only("patch_loss"),
)
