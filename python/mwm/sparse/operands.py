"""What may stand beside packed tiles in a function: tiles of the same places, one row per image, numbers, parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mwm.ops import TilePlan, image_expand

from .extent import Extent
from .packed import TILES, Packed
from .refusal import location, refuse


def packed_among(args: tuple, kwargs: dict) -> Iterator[Packed]:
    """The packed tiles among arguments, also inside lists."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Packed):
            yield value
        elif isinstance(value, list | tuple):
            for item in value:
                if isinstance(item, Packed):
                    yield item


def lead_of(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """The first packed argument, without pending padding."""
    lead = next(packed_among(args, kwargs))
    return settled(function, lead)


def settled(function: Callable, x: Packed) -> Packed:
    """x, refused where padding is pending that only a convolution or a pool may take."""
    if x._margin is not None:
        raise refuse(function, f"the map carries padding {tuple(x._margin[:4])} that only a convolution or a pooling may read",
                     "Pad directly before the convolution or pooling.")
    return x


def map_of(function: Callable, x: Any) -> Packed:
    """x as a map [T, C, t, t], refused if it is not one."""
    if not isinstance(x, Packed):
        raise refuse(function, f"its first argument is {type(x).__name__}, with packed tiles among the others")
    if x._axes != TILES:
        raise refuse(function, f"it reads [T, C, t, t], got axes {x._axes}", "Permute the map back to channels first.")
    return x


def same_places(function: Callable, x: Packed, lead: Packed) -> None:
    """Refuse unless the two are tiles of the same mask, axes and stride."""
    settled(function, x)
    if x._plan is not lead._plan and not _same_mask(x._plan, lead._plan):
        raise refuse(function, "its arguments were packed with different masks", "Pack once and share the plan.")
    if x._axes != lead._axes:
        raise refuse(function, f"its arguments have different axes, {lead._axes} and {x._axes}")
    for axis, mine, other in zip(lead._axes, lead._form.shape, x._form.shape, strict=True):
        if axis in "HW" and mine != other:
            raise ValueError(f"mwm.Packed: maps of different strides cannot be combined{location()}, got tiles of edge {mine} and {other}.")


def _same_mask(one: TilePlan, other: TilePlan) -> bool:
    if one.active is not other.active:
        return False
    # The tensor may have been written to between the two calls of pack; traced code cannot look.
    return torch.compiler.is_compiling() or torch.equal(one.coords, other.coords)


def aligned(function: Callable, value: Any, lead: Packed) -> Any:
    """An operand as the tensor to compute with beside the tiles of `lead`.

    Packed tiles of the same places give their data. A plain tensor must be a number, a parameter over channels, or one row
    per image, with H and W of size 1; rows per image are repeated for the tiles of the image.
    """
    if isinstance(value, Packed):
        same_places(function, value, lead)
        return value._data
    if isinstance(value, Extent):
        raise refuse(function, "it computes with the batch size, height or width of a tile as if it were the image's")
    if not isinstance(value, Tensor):
        return value
    return rows_to_tiles(function, value, lead)


def rows_to_tiles(function: Callable, value: Tensor, lead: Packed) -> Tensor:
    """A plain tensor, its axes aligned from the right with those of `lead`, with rows of images repeated for their tiles."""
    axes, missing = lead._axes, len(lead._axes) - value.dim()
    if missing < 0:
        raise refuse(function, f"a plain operand has the shape {list(value.shape)}, more axes than the packed tiles")
    for axis, size in zip(axes[missing:], value.shape, strict=True):
        if axis in "HW" and size != 1:
            raise refuse(function, f"a plain operand of shape {list(value.shape)} has a height or width, and does not say where it is visible",
                         "Pack it with the same mask.")
    if missing or value.shape[0] == 1:
        return value
    if value.shape[0] != lead._plan.batch_size:
        raise refuse(function, f"a plain operand of shape {list(value.shape)} has neither 1 nor one row per image ({lead._plan.batch_size})")
    return image_rows(value, lead._plan)


def image_rows(value: Tensor, plan: TilePlan) -> Tensor:
    """One row per image to one row per tile. [B, ...] -> [T, ...]"""
    if value.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        flat = value.reshape(plan.batch_size, value.shape[1:].numel())
        return image_expand(flat, plan).reshape(plan.coords.shape[0], *value.shape[1:])
    return value.index_select(0, plan.image_index())


def axis_of(x: Packed, dim: int) -> int:
    """A dimension number as a non-negative one."""
    dim = int(dim)
    if not -len(x._axes) <= dim < len(x._axes):
        raise IndexError(f"Dimension out of range (expected to be in range of [{-len(x._axes)}, {len(x._axes) - 1}], but got {dim})")
    return dim % len(x._axes)


def channel_axis(function: Callable, x: Packed, dim: Any) -> int:
    """The dimension number, refused unless it runs over channels."""
    if dim is None:
        raise refuse(function, "without a dimension it reaches over positions", "Name the channel dimension.")
    if isinstance(dim, list | tuple):
        if len(dim) != 1:
            raise refuse(function, f"of dimensions {tuple(dim)} more than one would be reduced", "Name the channel dimension alone.")
        dim = dim[0]
    axis = axis_of(x, dim)
    if x._axes[axis] != "C":
        meaning = {"T": "images", "H": "rows", "W": "columns"}[x._axes[axis]]
        raise refuse(function, f"dimension {dim} runs over {meaning}, and the tiles hold only the visible ones")
    return axis
