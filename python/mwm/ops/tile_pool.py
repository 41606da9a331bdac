"""Max and average pooling over packed tiles; windows see neighbouring tiles, and hidden ones as zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import gpu, native, reference_pool
from .backend import FLOATS, GPU_FLOATS, declare, resolve
from .pack_tiles import check_tiles
from .plan import TilePlan
from .pool_geometry import PoolGeometry
from .registry import once_only, register

declare("tile_pool", cpu=FLOATS, cuda=GPU_FLOATS, triton=GPU_FLOATS, reference=FLOATS)


def tile_pool(
    x: Tensor,
    plan: TilePlan,
    *,
    mode: str = "max",
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    pad_value: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Pool packed tiles as torch's dense op pools the unpacked map with zeros where hidden.

    Args:
        x: Packed tiles. float32 | bfloat16 | float16 | float64 [T, C, t, t]
        plan: Where the T tiles lie.
        mode: "max" (a hidden neighbour is 0, the padding of the image minus infinity) or "avg" (both are 0).
        kernel_size: Positions of a window, one number or (rows, columns).
        stride: Step between windows; None means `kernel_size`. Must divide t.
        padding: One number, (rows, columns), or (left, right, top, bottom) as in F.pad.
        dilation: Step inside a window, max only.
        ceil_mode: As in torch. Also windows that end beyond the padded map.
        count_include_pad: As in torch, avg only. Whether padding counts in the divisor.
        divisor_override: As in torch, avg only. The divisor itself.
        pad_value: Value of the padding instead of minus infinity, max only; it takes no gradient.
        backend: Forces an implementation; None picks the best.

    Returns:
        Packed tiles, same dtype, channels-last memory. [T, C, t // s, t // s]

    Raises:
        ValueError: A shape does not fit, or the dense output would not be the input divided by the stride.
        BackendError: `backend` cannot run this input; the message lists the reasons.

    Differentiable once in x. The gradient of a maximum goes to the first one in window order, as in torch, and nowhere
    when that is a hidden or padded position. Deterministic. Accumulates in float32 or wider; autocast leaves the dtype alone.
    """
    check_tiles("tile_pool", x, plan)
    if mode not in ("max", "avg"):
        raise ValueError(f'tile_pool: mode must be "max" or "avg", got {mode!r}.')
    kernel = _pair("kernel_size", kernel_size, 1)
    steps = kernel if stride is None else _pair("stride", stride, 1)
    geometry = PoolGeometry(
        mode, kernel, steps, _pair("dilation", dilation, 1), *_sides(padding), ceil_mode, count_include_pad, divisor_override or 0, pad_value
    )
    _check(geometry, divisor_override, x.shape[2], plan.grid)
    out, _ = _tile_pool(x, *plan.tensors()[:3], geometry.numbers(), pad_value, backend or "")
    return out


def _check(geometry: PoolGeometry, divisor: int | None, edge: int, grid: tuple[int, int]) -> None:
    if geometry.mode == "avg" and geometry.dilation != (1, 1):
        raise ValueError(f'tile_pool: dilation must be 1 with mode="avg", got {geometry.dilation}.')
    if geometry.mode == "avg" and geometry.pad_value not in (None, 0):
        raise ValueError(f'tile_pool: pad_value must be 0 or None with mode="avg", got {geometry.pad_value}.')
    if divisor is not None and divisor < 1:
        raise ValueError(f"tile_pool: divisor_override must be at least 1, got {divisor}.")
    if geometry.kernel[0] * geometry.kernel[1] > 32767:
        raise ValueError(f"tile_pool: kernel_size must have at most 32767 positions, got {geometry.kernel}.")
    height, width = grid[0] * edge, grid[1] * edge
    rows, columns = geometry.output_size(height, width)
    step_h, step_w = geometry.stride
    if step_h != step_w or edge % step_h or rows * step_h != height or columns * step_w != width:
        raise ValueError(
            f"tile_pool: the output must be the input divided by the stride, tile by tile; got tiles of edge {edge}, kernel_size "
            f"{geometry.kernel}, stride {geometry.stride}, padding (left, right, top, bottom) = "
            f"{(geometry.left, geometry.right, geometry.top, geometry.bottom)}: a {height} x {width} map becomes {rows} x {columns}, "
            f"not {height / step_h:g} x {width / step_w:g}. Choose another padding or a larger patch."
        )


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value) * (2 if len(value) == 1 else 1)
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"tile_pool: {name} must be one or two integers of at least {least}, got {value}.")
    return pair


def _sides(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    if not isinstance(padding, int) and len(padding) == 4:
        sides = tuple(padding)
    else:
        rows, columns = _pair("padding", padding, 0)
        sides = (columns, columns, rows, rows)
    if min(sides) < 0:
        raise ValueError(f"tile_pool: padding must not be negative, got {padding}.")
    return sides


def _new(like: Tensor, edge_h: int, edge_w: int, dtype: torch.dtype) -> Tensor:
    shape = (like.shape[0], like.shape[1], edge_h, edge_w)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)


def _fake(
    x: Tensor, active: Tensor, coords: Tensor, slots: Tensor, geometry: list[int], pad_value: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    edge_h, edge_w = x.shape[2] // geometry[3], x.shape[3] // geometry[4]
    taps = _new(x, edge_h, edge_w, torch.int16) if geometry[0] else x.new_empty(0, dtype=torch.int16)
    return _new(x, edge_h, edge_w, x.dtype), taps


def _implementation(
    x: Tensor, active: Tensor, coords: Tensor, slots: Tensor, geometry: list[int], pad_value: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    out, taps = _fake(x, active, coords, slots, geometry, pad_value, backend)
    name = resolve("tile_pool", backend, x)
    if name == "reference":
        found, where = reference_pool.forward(x, active, PoolGeometry.from_numbers(geometry, pad_value))
        return out.copy_(found), taps.copy_(where)
    x = _channels_last(x)
    padded = float("-inf") if pad_value is None else pad_value
    if name == "triton":
        with gpu.guard(x):
            gpu.triton_kernels("tile_pool").forward(x, coords, slots, list(geometry), padded, out, taps)
        return out, taps
    arguments = (native.view(x), native.view(coords), native.view(slots), list(geometry), padded, native.view(out), native.view(taps))
    if name == "cuda":
        with gpu.guard(x):
            gpu.cuda().tile_pool_forward(*arguments, *gpu.launch(x))
    else:
        native.core().tile_pool_forward(*arguments, native.threads())
    return out, taps


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, active, coords, slots, geometry, _, backend = inputs
    taps = output[1]
    ctx.mark_non_differentiable(taps)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(active, coords, slots, taps)
    ctx.edge, ctx.geometry, ctx.backend = x.shape[2], geometry, backend


def _backward(ctx: Any, grad: Tensor | None, _taps: Any) -> tuple:
    active, coords, slots, taps = ctx.saved_tensors
    grad_x = None
    if grad is not None:
        grad_x = _tile_pool_backward(grad, taps, active, coords, slots, ctx.geometry, ctx.edge, ctx.backend)
    return grad_x, None, None, None, None, None, None


def _backward_fake(
    grad: Tensor, taps: Tensor, active: Tensor, coords: Tensor, slots: Tensor, geometry: list[int], edge: int, backend: str
) -> Tensor:
    return _new(grad, edge, edge, grad.dtype)


def _backward_implementation(
    grad: Tensor, taps: Tensor, active: Tensor, coords: Tensor, slots: Tensor, geometry: list[int], edge: int, backend: str
) -> Tensor:
    out = _backward_fake(grad, taps, active, coords, slots, geometry, edge, backend)
    name = resolve("tile_pool", backend, grad)
    if name == "reference":
        return out.copy_(reference_pool.backward(grad, taps, active, PoolGeometry.from_numbers(geometry, None), edge))
    # A view does not keep its tensor alive, so each has a name until the kernel returns.
    grad, taps = _channels_last(grad), _channels_last(taps) if taps.dim() == 4 else taps
    if name == "triton":
        with gpu.guard(grad):
            gpu.triton_kernels("tile_pool").backward(grad, taps, coords, slots, list(geometry), out)
        return out
    arguments = (native.view(grad), native.view(taps), native.view(coords), native.view(slots), list(geometry), native.view(out))
    if name == "cuda":
        with gpu.guard(grad):
            gpu.cuda().tile_pool_backward(*arguments, *gpu.launch(grad))
    else:
        native.core().tile_pool_backward(*arguments, native.threads())
    return out


_tile_pool = register(
    "tile_pool",
    "(Tensor x, Tensor active, Tensor coords, Tensor slots, SymInt[] geometry, float? pad_value, str backend) -> (Tensor, Tensor)",
    _implementation,
    _fake,
    setup_context=_setup,
    backward=_backward,
)
_tile_pool_backward = register(
    "tile_pool_backward",
    "(Tensor grad, Tensor taps, Tensor active, Tensor coords, Tensor slots, SymInt[] geometry, SymInt edge, str backend) -> Tensor",
    _backward_implementation,
    _backward_fake,
    setup_context=lambda ctx, inputs, output: None,
    backward=once_only("tile_pool"),
)
