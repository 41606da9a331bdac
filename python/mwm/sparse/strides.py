"""Strides that do not divide the tile: refused, with the smallest patch that passes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .packed import Packed
from .refusal import StrideError, location
from .smallest_patch import smallest_patch


def stride_error(function: Callable | str, x: Packed, step: int) -> StrideError:
    """The error for a layer whose stride does not divide the tile; names layer, stride and the smallest legal patch."""
    patch, edge = x._plan.patch_size, x._data.shape[x._axes.index("H")]
    reached = patch * step // edge if patch % edge == 0 else step
    smallest = reached if torch.compiler.is_compiling() else smallest_patch(reached)
    return StrideError(
        f"mwm.Packed: the patch must be a multiple of every stride reached, got a patch of {patch} pixels and stride "
        f"{reached}{location()} (tiles of edge {edge}, step {step}). Use patches that are a multiple of {smallest} pixels, the smallest legal patch.",
        reached,
    )


def check_step(function: Callable | str, x: Packed, step: int) -> None:
    """Refuse a stride that does not divide the tile."""
    if x._data.shape[-1] % step:
        raise stride_error(function, x, step)
