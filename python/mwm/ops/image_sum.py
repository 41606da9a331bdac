"""Sums over the visible positions of each image, and the way back: what reduces over an image goes through here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gpu, native, reference
from .backend import FLOATS, GPU_FLOATS, declare, resolve
from .pack_tiles import check_tiles
from .plan import TilePlan
from .registry import register

declare("image_sum", cpu=FLOATS, cuda=GPU_FLOATS, triton=GPU_FLOATS, reference=FLOATS)
# Torch's own gather along the plan, on every device.
declare("image_expand", cpu=FLOATS, cuda=FLOATS, triton=FLOATS, reference=FLOATS)


def image_sum(x: Tensor, plan: TilePlan, *, backend: str | None = None) -> Tensor:
    """Sum packed tiles over the visible positions of each image.

    out[b, c] = sum over tiles n of image b and positions i, j of x[n, c, i, j]

    Args:
        x: Packed tiles. float32 | bfloat16 | float16 | float64 [T, C, t, t]
        plan: Where the T tiles lie.
        backend: Forces an implementation; None picks the best.

    Returns:
        Sums in float32 (float64 for float64 input); zero for an image without a visible patch. [B, C]

    Raises:
        ValueError: The tiles do not belong to the plan.
        BackendError: `backend` cannot run this input; the message lists the reasons.

    Differentiable in x; the adjoint of `image_expand` followed by a broadcast over the tile. Summed in a fixed order, so
    bitwise equal from run to run for any number of threads. Autocast leaves the dtype alone.
    """
    check_tiles("image_sum", x, plan)
    return _image_sum(x, *plan.tensors(), backend or "")


def image_expand(y: Tensor, plan: TilePlan, *, backend: str | None = None) -> Tensor:
    """Give each tile the row of its image.

    out[n, c] = y[b, c]  with b the image of tile n

    Args:
        y: One row per image. float32 | bfloat16 | float16 | float64 [B, C]
        plan: Where the T tiles lie.
        backend: Forces an implementation; None picks the best.

    Returns:
        One row per tile, same dtype. [T, C]

    Raises:
        ValueError: `y` has not one row per image of the plan.
        BackendError: `backend` cannot run this input; the message lists the reasons.

    Differentiable in y. Deterministic. Autocast leaves the dtype alone.
    """
    if y.dim() != 2 or y.shape[0] != plan.batch_size:
        raise ValueError(f"image_expand: y must be [B, C] with B = {plan.batch_size} (the plan's), got {list(y.shape)}.")
    if y.device != plan.device:
        raise ValueError(f"image_expand: y must lie on the plan's device {plan.device}, got {y.device}.")
    return _image_expand(y, *plan.tensors(), backend or "")


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sum_fake(x: Tensor, active: Tensor, coords: Tensor, slots: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return x.new_empty((active.shape[0], x.shape[1]), dtype=_sum_dtype(x.dtype))


def _sum_implementation(x: Tensor, active: Tensor, coords: Tensor, slots: Tensor, offsets: Tensor, backend: str) -> Tensor:
    out = _sum_fake(x, active, coords, slots, offsets, backend)
    name = resolve("image_sum", backend, x)
    if name == "reference":
        return out.copy_(reference.image_sum(x, active))
    if name == "triton":
        with gpu.guard(x):
            gpu.triton_kernels("image_sum").image_sum(x.contiguous(memory_format=torch.channels_last), offsets, out)
        return out
    views = native.view(x), native.view(offsets), native.view(out)
    if name == "cuda":
        with gpu.guard(x):
            gpu.cuda().image_sum(*views, *gpu.launch(x))
    else:
        native.core().image_sum(*views, native.threads())
    return out


def _sum_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, *plan, backend = inputs
    ctx.save_for_backward(*plan)
    ctx.shape, ctx.dtype, ctx.backend = x.shape, x.dtype, backend


def _sum_backward(ctx: Any, grad: Tensor) -> tuple:
    rows = _image_expand(grad.to(ctx.dtype), *ctx.saved_tensors, ctx.backend)
    return rows[:, :, None, None].expand(ctx.shape), None, None, None, None, None


def _expand_fake(y: Tensor, active: Tensor, coords: Tensor, slots: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return y.new_empty((coords.shape[0], y.shape[1]))


def _expand_implementation(y: Tensor, active: Tensor, coords: Tensor, slots: Tensor, offsets: Tensor, backend: str) -> Tensor:
    if resolve("image_expand", backend, y) == "reference":
        return _expand_fake(y, active, coords, slots, offsets, backend).copy_(reference.image_expand(y, active))
    return y.contiguous().index_select(0, coords[:, 0])


def _expand_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    y, *plan, backend = inputs
    ctx.save_for_backward(*plan)
    ctx.dtype, ctx.backend = y.dtype, backend


def _expand_backward(ctx: Any, grad: Tensor) -> tuple:
    rows = _image_sum(grad[:, :, None, None], *ctx.saved_tensors, ctx.backend)
    return rows.to(ctx.dtype), None, None, None, None, None


_PLAN = "Tensor active, Tensor coords, Tensor slots, Tensor offsets, str backend"
_image_sum = register(
    "image_sum", f"(Tensor x, {_PLAN}) -> Tensor", _sum_implementation, _sum_fake, setup_context=_sum_setup, backward=_sum_backward
)
_image_expand = register(
    "image_expand",
    f"(Tensor y, {_PLAN}) -> Tensor",
    _expand_implementation,
    _expand_fake,
    setup_context=_expand_setup,
    backward=_expand_backward,
)
