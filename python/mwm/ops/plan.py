"""Where the tiles of a batch lie, and who is whose neighbour; one plan serves every layer and stride of one mask."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from . import gpu, native, reference
from .backend import declare, resolve
from .registry import register

declare("build_plan", cpu=(torch.bool,), cuda=(torch.bool,), triton=(torch.bool,), reference=(torch.bool,))


@dataclass(frozen=True, eq=False)
class TilePlan:
    """Layout of the packed tiles of one mask. Make it with `build_plan`.

    Attributes:
        active: True where a patch is visible. bool [B, Gh, Gw]
        coords: (image, row, column) of each tile, in row-major order of `active`. int32 [T, 3]
        slots: Tile index of each patch, -1 where hidden. int32 [B, Gh, Gw]
        offsets: First tile of each image; the last entry is T. int32 [B + 1]
        patch_size: Edge of a patch in pixels.
        visible: Number of visible patches of every image where it is constant and given, else None.
    """

    active: Tensor
    coords: Tensor
    slots: Tensor
    offsets: Tensor
    patch_size: int
    visible: int | None = None

    @property
    def num_tiles(self) -> int:
        """T, the number of visible patches in the batch."""
        return self.coords.shape[0]

    @property
    def batch_size(self) -> int:
        """B, the number of images."""
        return self.active.shape[0]

    @property
    def grid(self) -> tuple[int, int]:
        """(Gh, Gw), the patch grid."""
        return self.active.shape[1], self.active.shape[2]

    @property
    def device(self) -> torch.device:
        """Device of the index tensors; tiles must lie on the same."""
        return self.coords.device

    def image_index(self) -> Tensor:
        """Image of each tile. int64 [T]"""
        return self.coords[:, 0].long()

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(active, coords, slots, offsets), as the registered ops take them."""
        return self.active, self.coords, self.slots, self.offsets

    def to(self, device: torch.device | str) -> TilePlan:
        """The same plan on another device."""
        moved = [tensor.to(device) for tensor in self.tensors()]
        return TilePlan(*moved, self.patch_size, self.visible)


def build_plan(active: Tensor, patch_size: int, *, visible: int | None = None, backend: str | None = None) -> TilePlan:
    """Number the visible patches of a batch in row-major order.

    Args:
        active: True where a patch is visible. bool [B, Gh, Gw]
        patch_size: Edge of a patch in pixels, at least 1.
        visible: Number of visible patches of every image, where it is constant: T = B * visible is then known without
            looking at the mask, so that shapes are static and a CUDA mask needs no synchronisation. Without it a CUDA mask
            costs one: the host waits for T.
        backend: Forces an implementation; None picks the best.

    Returns:
        The plan, on the device of `active`.

    Raises:
        TypeError: `active` is not a bool tensor, or `visible` no whole number.
        ValueError: A shape does not fit, or (CPU) an image has another number of visible patches than `visible`. On a
            GPU the latter is a device-side assertion.
    """
    if not isinstance(active, Tensor) or active.dtype != torch.bool:
        got = active.dtype if isinstance(active, Tensor) else type(active).__name__
        raise TypeError(f"build_plan: active must be a bool tensor [B, Gh, Gw], got {got}. True means visible.")
    if active.dim() != 3:
        raise ValueError(f"build_plan: active must be [B, Gh, Gw], got {list(active.shape)}.")
    if visible is not None and (isinstance(visible, bool) or not isinstance(visible, int | torch.SymInt | Integral)):
        raise TypeError(f"build_plan: visible must be a whole number of patches, got {visible!r}. Leave it out where counts differ.")
    if patch_size < 1:
        raise ValueError(f"build_plan: patch_size must be at least 1 pixel, got {patch_size}.")
    if visible is not None and not 0 <= visible <= active.shape[1] * active.shape[2]:
        raise ValueError(
            f"build_plan: visible must be between 0 and the {active.shape[1] * active.shape[2]} patches of the grid, got {visible}."
        )
    coords, slots, offsets = _build_plan(active, -1 if visible is None else visible, backend or "")
    return TilePlan(active, coords, slots, offsets, patch_size, visible)


def _implementation(active: Tensor, visible: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    name = resolve("build_plan", backend, active)
    if name == "reference":
        return reference.build_plan(active, visible)
    batch = active.shape[0]
    slots = torch.empty(active.shape, dtype=torch.int32, device=active.device)
    offsets = torch.empty((batch + 1,), dtype=torch.int32, device=active.device)
    with gpu.guard(active):
        if visible >= 0:
            tiles = batch * visible
        elif name == "cuda":
            gpu.cuda().plan_offsets(native.view(active), native.view(offsets), *gpu.launch(active))
            tiles = int(offsets[batch])  # waits for the device: T decides on every shape from here on
        elif name == "triton":
            offsets[0], offsets[1:] = 0, active.sum((1, 2)).cumsum(0)
            tiles = int(offsets[batch])
        else:
            tiles = int(active.count_nonzero())
        coords = torch.empty((tiles, 3), dtype=torch.int32, device=active.device)
        arguments = native.view(active), visible, native.view(coords), native.view(slots), native.view(offsets)
        if name == "triton":
            gpu.triton_kernels("build_plan").build_plan(gpu.as_bytes(active), visible, coords, slots, offsets)
        elif name == "cuda":
            gpu.cuda().build_plan(*arguments, *gpu.launch(active))
        else:
            native.core().build_plan(*arguments)
    return coords, slots, offsets


def _fake(active: Tensor, visible: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    batch = active.shape[0]
    tiles = torch.library.get_ctx().new_dynamic_size() if visible < 0 else batch * visible
    coords = active.new_empty((tiles, 3), dtype=torch.int32)
    slots = torch.empty(active.shape, dtype=torch.int32, device=active.device)
    return coords, slots, active.new_empty((batch + 1,), dtype=torch.int32)


_build_plan = register(
    "build_plan", "(Tensor active, int visible, str backend) -> (Tensor, Tensor, Tensor)", _implementation, _fake
)


def _flatten(plan: TilePlan) -> tuple[list[Tensor], tuple[int, int | None]]:
    return list(plan.tensors()), (plan.patch_size, plan.visible)


def _unflatten(tensors: Any, context: tuple[int, int | None]) -> TilePlan:
    return TilePlan(*tensors, *context)


_pytree.register_pytree_node(TilePlan, _flatten, _unflatten, serialized_type_name="mwm.ops.TilePlan")
