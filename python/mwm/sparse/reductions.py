"""Reductions over H and W: per image, over its visible positions. Reductions over channels stay on the tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mwm.ops import TilePlan, image_sum, unpack_tiles

from .operands import axis_of, image_rows, settled
from .packed import Packed
from .refusal import refuse
from .registry import handles, named
from .shapes import merged_channels


def image_count(plan: TilePlan, edge: int) -> Tensor:
    """Visible positions of each image, at least 1 so that it can divide. int64 [B, 1]"""
    return (plan.offsets.diff().long() * (edge * edge)).clamp(min=1)[:, None]


def sum_rows(x: Tensor, plan: TilePlan) -> Tensor:
    """Sum over each image in float32 or wider. [T, C, t, t] -> [B, C]"""
    return image_sum(x, plan)


def mean_rows(x: Tensor, plan: TilePlan) -> Tensor:
    """Mean over each image in float32 or wider, 0 without a visible patch. [T, C, t, t] -> [B, C]"""
    sums = image_sum(x, plan)
    return sums / image_count(plan, x.shape[-1]).to(sums.dtype)


def max_rows(x: Tensor, plan: TilePlan, *, sign: int = 1) -> Tensor:
    """Maximum (sign 1) or minimum (sign -1) over each image, 0 without a visible patch. [T, C, t, t] -> [B, C]"""
    dense = unpack_tiles(x, plan, fill=-sign * float("inf"))
    found = dense.amax((2, 3)) if sign > 0 else dense.amin((2, 3))
    return torch.where((plan.offsets.diff() > 0)[:, None], found, torch.zeros_like(found))


def centred_squares(x: Tensor, plan: TilePlan) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared distances from it, of each image. [T, C, t, t] -> two of [B, C]"""
    wide = x if x.dtype == torch.float64 else x.float()
    mean = mean_rows(wide, plan)
    return mean, image_sum((wide - image_rows(mean, plan)[:, :, None, None]).square(), plan)


def image_mean(x: Packed, *, keepdim: bool) -> Tensor:
    """Global average pooling. [B, C, 1, 1] or [B, C]"""
    return _shaped(mean_rows(_plain(x), x._plan).to(x.dtype), x, keepdim)


def image_max(x: Packed, *, keepdim: bool) -> Tensor:
    """Global maximum pooling. [B, C, 1, 1] or [B, C]"""
    return _shaped(max_rows(_plain(x), x._plan), x, keepdim)


def _plain(x: Packed) -> Tensor:
    if x._margin is not None:
        raise refuse("a global pooling", "padding is pending")
    return merged_channels(x)[0]


def _shaped(rows: Tensor, x: Packed, keepdim: bool) -> Tensor:
    """[B, C] in the axes of x, H and W of size 1 or left out."""
    sizes = [x._plan.batch_size]
    for axis, size in zip(x._axes[1:], x._data.shape[1:], strict=True):
        if axis == "C":
            sizes.append(size)
        elif keepdim:
            sizes.append(1)
    return rows.reshape(sizes)


def _split(function: Callable, x: Packed, dims: Any) -> tuple[list[int], bool]:
    """The dimensions that run over channels, and whether H and W are reduced too."""
    if dims is None or (isinstance(dims, Sequence) and len(dims) == 0):
        raise refuse(function, "without dimensions it reduces over all images", "Name H and W, or use x.tiles or x.unpack().")
    numbers = [axis_of(x, dim) for dim in (dims if isinstance(dims, list | tuple | torch.Size) else (dims,))]
    letters = "".join(x._axes[n] for n in numbers)
    if "T" in letters:
        raise refuse(function, "it reduces over the images of the batch")
    if ("H" in letters) != ("W" in letters):
        raise refuse(function, "it reduces over rows or columns alone, and the tiles of a row are not whole", "Reduce over H and W together.")
    return [n for n in numbers if x._axes[n] == "C"], "H" in letters


def _arguments(args: tuple, kwargs: dict, names: tuple[str, ...]) -> dict:
    given = {**dict(zip(names, args[1:], strict=False)), **kwargs}
    if "axis" in given:
        given["dim"] = given.pop("axis")
    return given


def _reduced(function: Callable, args: tuple, kwargs: dict, over_image: Callable[[Tensor, TilePlan], Tensor], names: tuple = ("dim", "keepdim")) -> Any:
    x = settled(function, args[0])
    given = _arguments(args, kwargs, names)
    if given.get("out") is not None:
        raise refuse(function, "out= is not supported")
    if given.get("dtype") is not None:
        x = x._like(x._data.to(given["dtype"]))
    channels, spatial = _split(function, x, given.get("dim"))
    keepdim = bool(given.get("keepdim", False))
    if channels:
        x = x._like(function(x._data, channels, keepdim=True))
    if spatial:
        rows = _shaped(over_image(_plain(x), x._plan).to(x.dtype), x, keepdim=True)
        gone = sorted([*channels, x._axes.index("H"), x._axes.index("W")])
        return rows if keepdim else rows.reshape([size for i, size in enumerate(rows.shape) if i not in gone])
    if keepdim:
        return x
    axes = "".join(axis for i, axis in enumerate(x._axes) if i not in channels)
    if "C" not in axes:
        raise refuse(function, "no axis of channels would remain", "Use keepdim=True.")
    return x._like(x._data.squeeze(tuple(channels)), axes)


@handles(*named(["sum"], (torch, Tensor)))
def total(function: Callable, args: tuple, kwargs: dict) -> Any:
    """Over everything a number: hidden positions are zero; else as `mean`."""
    if len(args) == 1 and not kwargs:
        return settled(function, args[0])._data.sum()
    return _reduced(function, args, kwargs, sum_rows)


@handles(*named(["mean"], (torch, Tensor)))
def mean(function: Callable, args: tuple, kwargs: dict) -> Any:
    """Over the visible positions of each image, or over channels."""
    return _reduced(function, args, kwargs, mean_rows)


@handles(*named(["amax"], (torch, Tensor)))
def amax(function: Callable, args: tuple, kwargs: dict) -> Any:
    """Over the visible positions of each image, or over channels."""
    return _reduced(function, args, kwargs, max_rows)


@handles(*named(["amin"], (torch, Tensor)))
def amin(function: Callable, args: tuple, kwargs: dict) -> Any:
    """Over the visible positions of each image, or over channels."""
    return _reduced(function, args, kwargs, lambda x, plan: max_rows(x, plan, sign=-1))


@handles(*named(["max", "min"], (torch, Tensor)))
def extremum(function: Callable, args: tuple, kwargs: dict) -> Any:
    """Of two maps per position, or (values, indices) over channels."""
    from .pointwise import pointwise

    other = args[1] if len(args) > 1 else kwargs.get("other", kwargs.get("dim"))
    if isinstance(other, Packed | Tensor):
        return pointwise(torch.maximum if function.__name__ == "max" else torch.minimum, args, kwargs)
    x = settled(function, args[0])
    given = _arguments(args, kwargs, ("dim", "keepdim"))
    channels, spatial = _split(function, x, given.get("dim"))
    if spatial:
        raise refuse(function, "its indices are those of the dense map", "Use amax or amin.")
    keepdim = bool(given.get("keepdim", False))
    values, indices = function(x._data, channels[0], keepdim)
    axes = x._axes if keepdim else x._axes[: channels[0]] + x._axes[channels[0] + 1 :]
    if "C" not in axes:
        raise refuse(function, "no axis of channels would remain", "Use keepdim=True.")
    return getattr(torch.return_types, function.__name__)((x._like(values, axes), x._like(indices, axes)))


def _spread(function: Callable, args: tuple, kwargs: dict, *, root: bool, with_mean: bool) -> Any:
    x = settled(function, args[0])
    given = {"correction": 1, **kwargs}
    rest = list(args[1:])
    if rest and isinstance(rest[0], bool):
        raise refuse(function, "without dimensions it reduces over all images", "Name H and W.")
    given.update(zip(("dim", "unbiased", "keepdim"), rest, strict=False))
    if given.get("unbiased") is not None:
        given["correction"] = int(given["unbiased"])
    dims = given.get("dim", given.get("axis"))
    keepdim, correction = bool(given.get("keepdim", False)), given["correction"]
    correction = 1 if correction is None else correction
    channels, spatial = _split(function, x, dims)
    if not spatial:
        found = torch.var(x._data, channels, correction=correction, keepdim=True)
        centre = torch.mean(x._data, channels, keepdim=True)
        if not keepdim and x._axes.count("C") == len(channels):
            raise refuse(function, "no axis of channels would remain", "Use keepdim=True.")
        axes = x._axes if keepdim else "".join(a for i, a in enumerate(x._axes) if i not in channels)
        cut = (lambda data: data) if keepdim else (lambda data: data.squeeze(tuple(channels)))
        found = found.sqrt() if root else found
        return (x._like(cut(found), axes), x._like(cut(centre), axes)) if with_mean else x._like(cut(found), axes)
    gone = sorted([*channels, x._axes.index("H"), x._axes.index("W")])

    def shaped(rows: Tensor, like: Packed) -> Tensor:
        rows = _shaped(rows.to(x.dtype), like, keepdim=True)
        return rows if keepdim else rows.reshape([size for i, size in enumerate(rows.shape) if i not in gone])

    count = image_count(x._plan, x._data.shape[x._axes.index("H")])
    if channels:
        wide = x._like(x._data if x.dtype == torch.float64 else x._data.float())
        lead = wide._like(wide._data.mean(channels, keepdim=True))
        centre = mean_rows(_plain(lead), x._plan)
        gap = wide._data - image_rows(_shaped(centre, lead, keepdim=True), x._plan)
        squares = sum_rows(_plain(wide._like(gap.square().sum(channels, keepdim=True))), x._plan)
        count = count * (wide._data.numel() // max(1, lead._data.numel()))
    else:
        lead = x
        centre, squares = centred_squares(_plain(x), x._plan)
    found = squares / (count - correction).clamp(min=1).to(squares.dtype)
    found = shaped(safe_sqrt(found) if root else found, lead)
    return (found, shaped(centre, lead)) if with_mean else found


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0."""
    zero = x == 0
    return torch.where(zero, torch.ones_like(x), x).sqrt().masked_fill(zero, 0.0)


for _name, _root, _mean in (("var", False, False), ("std", True, False), ("var_mean", False, True), ("std_mean", True, True)):
    handles(*named([_name], (torch, Tensor)))(
        lambda function, args, kwargs, root=_root, with_mean=_mean: _spread(function, args, kwargs, root=root, with_mean=with_mean)
    )


@handles(torch.norm, Tensor.norm, torch.linalg.vector_norm)
def norm(function: Callable, args: tuple, kwargs: dict) -> Any:
    """1-, 2- and max-norm over the visible positions of each image, or over channels."""
    given = {**dict(zip(("p", "dim", "keepdim"), args[1:], strict=False)), **kwargs}
    order = given.get("p", given.get("ord", 2))
    order = 2 if order in (None, "fro") else order
    if order not in (1, 2, float("inf")):
        raise refuse(function, f"norms of order {order} are not known to it", "Use order 1, 2 or infinity.")
    if given.get("dim") is None or given.get("out") is not None:
        raise refuse(function, "without dimensions it reduces over all images", "Name H and W.")
    x = settled(function, args[0])
    channels, spatial = _split(function, x, given["dim"])
    keepdim = bool(given.get("keepdim", False))
    if not spatial:
        if not keepdim and x._axes.count("C") == len(channels):
            raise refuse(function, "no axis of channels would remain", "Use keepdim=True.")
        axes = x._axes if keepdim else "".join(a for i, a in enumerate(x._axes) if i not in channels)
        return x._like(torch.linalg.vector_norm(x._data, order, channels, keepdim), axes)
    if channels:
        raise refuse(function, "it reduces over channels and positions at once")
    tiles = _plain(x)
    if order == 2:
        wide = tiles if tiles.dtype == torch.float64 else tiles.float()
        rows = safe_sqrt(sum_rows(wide.square(), x._plan))
    else:
        rows = sum_rows(tiles.abs(), x._plan) if order == 1 else max_rows(tiles.abs(), x._plan)
    return _shaped(rows.to(x.dtype), x, keepdim)
