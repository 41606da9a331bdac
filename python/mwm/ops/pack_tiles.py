"""Dense map to packed tiles and back; each is the other's adjoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gpu, native, reference
from .backend import ANY, FLOATS, declare, resolve
from .plan import TilePlan
from .registry import once_only, register

declare("pack_tiles", cpu=ANY, cuda=ANY, triton=ANY)
declare("unpack_tiles", cpu=ANY, cuda=ANY, triton=ANY)


def pack_tiles(x: Tensor, plan: TilePlan, *, backend: str | None = None) -> Tensor:
    """Keep the visible tiles of a dense map.

    out[n, c, i, j] = x[b, c, row * t + i, col * t + j]  with (b, row, col) = plan.coords[n] and t = H // Gh

    Args:
        x: Dense map, any dtype and strides. [B, C, H, W]
        plan: Where the T visible tiles lie.
        backend: Forces an implementation; None picks the best.

    Returns:
        Packed tiles, same dtype, channels-last memory. [T, C, t, t]

    Raises:
        ValueError: The map does not divide into the square tiles of the plan's grid, or lies on another device.
        BackendError: `backend` cannot run this input; the message lists the reasons.

    Differentiable in x; the gradient of a hidden pixel is exactly zero. Deterministic. Autocast leaves the dtype alone.
    """
    rows, columns = plan.grid
    if x.dim() != 4 or x.shape[0] != plan.batch_size:
        raise ValueError(f"pack_tiles: x must be [B, C, H, W] with B = {plan.batch_size} (the plan's), got {list(x.shape)}.")
    height, width = x.shape[2], x.shape[3]
    if height % rows or width % columns or height // rows != width // columns:
        raise ValueError(
            f"pack_tiles: x must divide into square tiles on the plan's grid {rows} x {columns}, got H x W = {height} x {width}. "
            f"Resize x, or use a grid of H / t by W / t tiles."
        )
    _same_device("pack_tiles", x, plan)
    return _pack_tiles(x, plan.active, plan.coords, plan.slots, backend or "")


def unpack_tiles(tiles: Tensor, plan: TilePlan, fill: float | Tensor = 0.0, *, backend: str | None = None) -> Tensor:
    """Put packed tiles back into a dense map; hidden tiles become `fill`.

    Args:
        tiles: Packed tiles, any dtype and strides. [T, C, t, t]
        plan: Where the T tiles lie.
        fill: Value of hidden positions, or one for each channel (a mask token), which is cast to the tiles' dtype. [C]
        backend: Forces an implementation; None picks the best.

    Returns:
        Dense map, same dtype, channels-last memory. [B, C, Gh * t, Gw * t]

    Raises:
        ValueError: The tiles do not belong to the plan, or the tensor `fill` not to the tiles.
        TypeError: `fill` is a tensor and one of the two is not floating.
        BackendError: `backend` cannot run this input; the message lists the reasons.

    Differentiable in tiles, and in `fill` where it is a tensor. Deterministic. Autocast leaves the dtype alone.
    """
    check_tiles("unpack_tiles", tiles, plan)
    if isinstance(fill, Tensor):
        return _with_token(tiles, plan, fill, backend or "")
    return _unpack_tiles(tiles, plan.active, plan.coords, plan.slots, fill, backend or "")


def _with_token(tiles: Tensor, plan: TilePlan, token: Tensor, backend: str) -> Tensor:
    if token.shape != tiles.shape[1:2]:
        raise ValueError(f"unpack_tiles: fill must be a number or [C] with C = {tiles.shape[1]} (the channels of tiles), got {list(token.shape)}.")
    if token.device != tiles.device:
        raise ValueError(f"unpack_tiles: fill must lie on the device of tiles ({tiles.device}), got {token.device}. Move one of them.")
    if not (token.dtype.is_floating_point and tiles.dtype.is_floating_point):
        raise TypeError(f"unpack_tiles: fill may be a tensor where both are floating, got {token.dtype} for tiles of {tiles.dtype}. Give a number.")
    token = token.to(tiles.dtype)
    if tiles.device.type == "cpu" and tiles.dtype in FLOATS and resolve("unpack_tiles", backend, tiles) == "cpu":
        return _unpack_token(tiles, token, plan.active, plan.coords, plan.slots)
    dense = _unpack_tiles(tiles, plan.active, plan.coords, plan.slots, 0.0, backend)
    edge = tiles.shape[-1]
    visible = plan.active.repeat_interleave(edge, 1).repeat_interleave(edge, 2)[:, None]
    return torch.where(visible, dense, token[:, None, None])


def check_tiles(op: str, tiles: Tensor, plan: TilePlan) -> None:
    """Raise ValueError unless `tiles` is [T, C, t, t] for this plan, on the plan's device."""
    if tiles.dim() != 4 or tiles.shape[2] != tiles.shape[3]:
        raise ValueError(f"{op}: tiles must be [T, C, t, t], got {list(tiles.shape)}.")
    if tiles.shape[0] != plan.num_tiles:
        raise ValueError(f"{op}: tiles must have T = {plan.num_tiles} (the plan's visible patches), got {list(tiles.shape)}.")
    _same_device(op, tiles, plan)


def _same_device(op: str, x: Tensor, plan: TilePlan) -> None:
    if x.device != plan.device:
        raise ValueError(f"{op}: x must lie on the plan's device {plan.device}, got {x.device}. Use plan.to(x.device).")


def _new_tiles(like: Tensor, tiles: int, channels: int, edge: int) -> Tensor:
    return torch.empty((tiles, channels, edge, edge), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _pack_implementation(x: Tensor, active: Tensor, coords: Tensor, slots: Tensor, backend: str) -> Tensor:
    out = _new_tiles(x, coords.shape[0], x.shape[1], _edge(x, slots))
    name = resolve("pack_tiles", backend, x)
    if name == "reference":
        return out.copy_(reference.pack_tiles(x, active))
    if name == "triton":
        with gpu.guard(x):
            gpu.triton_kernels("pack_tiles").pack_tiles(x, coords, out)
        return out
    views = native.view(x), native.view(coords), native.view(slots), native.view(out)
    if name == "cuda":
        with gpu.guard(x):
            gpu.cuda().pack_tiles(*views, *gpu.launch(x))
    else:
        native.core().pack_tiles(*views, native.threads())
    return out


def _edge(x: Tensor, slots: Tensor) -> int:
    return x.shape[2] // slots.shape[1]


def _pack_fake(x: Tensor, active: Tensor, coords: Tensor, slots: Tensor, backend: str) -> Tensor:
    return _new_tiles(x, coords.shape[0], x.shape[1], _edge(x, slots))


def _pack_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, active, coords, slots, backend = inputs
    ctx.save_for_backward(active, coords, slots)
    ctx.backend = backend


def _pack_backward(ctx: Any, grad: Tensor) -> tuple:
    active, coords, slots = ctx.saved_tensors
    return _unpack_tiles(grad, active, coords, slots, 0.0, ctx.backend), None, None, None, None


def _unpack_implementation(tiles: Tensor, active: Tensor, coords: Tensor, slots: Tensor, fill: float, backend: str) -> Tensor:
    out = _unpack_fake(tiles, active, coords, slots, fill, backend)
    name = resolve("unpack_tiles", backend, tiles)
    if name == "reference":
        return out.copy_(reference.unpack_tiles(tiles, active, fill))
    if name == "triton":
        with gpu.guard(tiles):
            gpu.triton_kernels("pack_tiles").unpack_tiles(tiles, slots, fill, out)
        return out
    if name == "cuda":
        with gpu.guard(tiles):
            gpu.cuda().unpack_tiles(native.view(tiles), native.view(slots), fill, native.view(out), *gpu.launch(tiles))
    else:
        native.core().unpack_tiles(native.view(tiles), native.view(slots), fill, None, native.view(out), native.threads())
    return out


def _unpack_fake(tiles: Tensor, active: Tensor, coords: Tensor, slots: Tensor, fill: float, backend: str) -> Tensor:
    batch, rows, columns = slots.shape
    _, channels, edge, _ = tiles.shape
    return torch.empty(
        (batch, channels, rows * edge, columns * edge),
        dtype=tiles.dtype,
        device=tiles.device,
        memory_format=torch.channels_last,
    )


def _unpack_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, active, coords, slots, _, backend = inputs
    ctx.save_for_backward(active, coords, slots)
    ctx.backend = backend


def _unpack_backward(ctx: Any, grad: Tensor) -> tuple:
    active, coords, slots = ctx.saved_tensors
    return _pack_tiles(grad, active, coords, slots, ctx.backend), None, None, None, None, None


def _token_implementation(tiles: Tensor, token: Tensor, active: Tensor, coords: Tensor, slots: Tensor) -> Tensor:
    out, token = _token_fake(tiles, token, active, coords, slots), token.contiguous()
    native.core().unpack_tiles(native.view(tiles), native.view(slots), 0.0, native.view(token), native.view(out), native.threads())
    return out


def _token_fake(tiles: Tensor, token: Tensor, active: Tensor, coords: Tensor, slots: Tensor) -> Tensor:
    return _unpack_fake(tiles, active, coords, slots, 0.0, "")


def _token_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _token_backward(ctx: Any, grad: Tensor) -> tuple:
    active, coords, slots = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_tiles = _pack_tiles(grad, active, coords, slots, "") if needs[0] else None
    return grad_tiles, _grad_token(grad, slots) if needs[1] else None, None, None, None


def _grad_token_implementation(grad: Tensor, slots: Tensor) -> Tensor:
    """Sum of the gradient over hidden positions, accumulated in float32 (float64 for float64). [C]"""
    out, grad = _grad_token_fake(grad, slots), grad.contiguous(memory_format=torch.channels_last)
    sums = torch.empty((*slots.shape[:2], grad.shape[1]), dtype=torch.float64 if grad.dtype == torch.float64 else torch.float32)
    native.core().unpack_tiles_grad_token(native.view(grad), native.view(slots), native.view(sums), native.view(out), native.threads())
    return out


def _grad_token_fake(grad: Tensor, slots: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[1])


_pack_tiles = register(
    "pack_tiles",
    "(Tensor x, Tensor active, Tensor coords, Tensor slots, str backend) -> Tensor",
    _pack_implementation,
    _pack_fake,
    setup_context=_pack_setup,
    backward=_pack_backward,
)
_unpack_tiles = register(
    "unpack_tiles",
    "(Tensor tiles, Tensor active, Tensor coords, Tensor slots, float fill, str backend) -> Tensor",
    _unpack_implementation,
    _unpack_fake,
    setup_context=_unpack_setup,
    backward=_unpack_backward,
)
_grad_token = register(
    "unpack_tiles_grad_token",
    "(Tensor grad, Tensor slots) -> Tensor",
    _grad_token_implementation,
    _grad_token_fake,
    setup_context=lambda ctx, inputs, output: None,
    backward=once_only("unpack_tiles with a tensor as fill"),
)
_unpack_token = register(
    "unpack_tiles_token",
    "(Tensor tiles, Tensor token, Tensor active, Tensor coords, Tensor slots) -> Tensor",
    _token_implementation,
    _token_fake,
    setup_context=_token_setup,
    backward=_token_backward,
)
