"""Views: permutes, splits and merges of channels, channel slices. Rows, columns and tiles keep their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .extent import Extent
from .operands import axis_of, channel_axis, settled
from .packed import Packed
from .refusal import refuse
from .registry import handles
from .strides import stride_error

# To channels last and back, around the norms and linear layers of ConvNeXt and its kin; looked up, because the general way takes 6 µs.
_USUAL = {("TCHW", (0, 2, 3, 1)): "THWC", ("THWC", (0, 3, 1, 2)): "TCHW"}
_MEANING = {"T": "images", "C": "channels", "H": "rows", "W": "columns"}


def _sizes(args: tuple) -> list:
    return list(args[0]) if len(args) == 1 and isinstance(args[0], list | tuple | torch.Size) else list(args)


@handles(torch.permute, Tensor.permute)
def permute(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """Any order that keeps the tiles first and rows before columns."""
    x = settled(function, args[0])
    if len(args) == 5 and (axes := _USUAL.get((x._axes, args[1:]))):
        return x._like(x._data.permute(*args[1:]), axes)
    dims = [axis_of(x, dim) for dim in _sizes((kwargs["dims"],) if "dims" in kwargs else args[1:])]
    return _permuted(function, x, dims)


def _permuted(function: Callable, x: Packed, dims: Sequence[int]) -> Packed:
    axes = "".join(x._axes[dim] for dim in dims)
    if axes[0] != "T" or axes.index("H") > axes.index("W"):
        raise refuse(function, f"the axes would become {axes}: tiles stay first, rows before columns")
    return x._like(x._data.permute(dims), axes)


@handles(torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes, torch.swapdims, Tensor.swapdims)
def transpose(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """Two axes exchanged, as far as `permute` allows."""
    x = settled(function, args[0])
    first, second = [axis_of(x, dim) for dim in (*args[1:], *(kwargs[k] for k in ("dim0", "dim1", "axis0", "axis1") if k in kwargs))]
    dims = list(range(len(x._axes)))
    dims[first], dims[second] = second, first
    return _permuted(function, x, dims)


@handles(torch.movedim, Tensor.movedim, torch.moveaxis, Tensor.moveaxis)
def movedim(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """One axis moved elsewhere, as far as `permute` allows."""
    x = settled(function, args[0])
    source, destination = (*args[1:], *kwargs.values())
    order = len(x._axes)
    pairs = list(zip(_sizes((source,)), _sizes((destination,)), strict=True))
    dims: list[int | None] = [None] * order
    for old, new in pairs:
        dims[axis_of(x, new)] = axis_of(x, old)
    rest = iter(d for d in range(order) if d not in dims)
    return _permuted(function, x, [next(rest) if d is None else d for d in dims])


@handles(Tensor.view, Tensor.reshape, torch.reshape)
def reshape(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """Channels split or merged; the other axes must stay."""
    x = settled(function, args[0])
    sizes = _sizes((kwargs["shape"],) if "shape" in kwargs else args[1:])
    if len(sizes) == 1 and isinstance(sizes[0], torch.dtype):
        raise refuse(function, "it reinterprets the bits of the values")
    return _reshaped(function, x, sizes)


@handles(Tensor.view_as, Tensor.reshape_as)
def reshape_as(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """The shape of other packed tiles."""
    x, other = args
    if not isinstance(x, Packed) or not isinstance(other, Packed):
        raise refuse(function, "one of the two is a plain tensor")
    return _reshaped(function, settled(function, x), list(other._data.shape))


def _reshaped(function: Callable, x: Packed, sizes: list) -> Packed:
    """Match the new sizes with the axes: T, H and W one to one, channels between them in any split."""
    new = [int(size) if isinstance(size, Extent) else size for size in sizes]
    old = x._data.shape
    if new and new[0] == -1:
        new = [old[0], *new[1:]]
    elif new.count(-1) == 1:
        at, per_tile, known = new.index(-1), _product(old[1:]), _product([size for size in new[1:] if size != -1])
        if known and per_tile % known == 0:
            new = [*new[:at], per_tile // known, *new[at + 1 :]]
    axes = _match(x._axes, old, new)
    if axes is None:
        raise refuse(function, f"{[str(size) for size in sizes]} does more than split or merge the channels of {list(old)} (axes {x._axes})",
                     "Flatten after a global pooling, or use mean over H and W.")
    return x._like(x._data.reshape(new), axes)


def _match(axes: str, old: Sequence[int], new: Sequence[int]) -> str | None:
    out, at, index = "", 0, 0
    while index < len(axes):
        if axes[index] != "C":
            if at >= len(new) or new[at] != old[index]:
                return None
            out, at, index = out + axes[index], at + 1, index + 1
            continue
        end = index
        channels = 1
        while end < len(axes) and axes[end] == "C":
            channels, end = channels * old[end], end + 1
        # As many new axes as leave one for each axis that follows this run of channels and is not itself a channel run.
        later = sum(1 for axis in axes[end:] if axis != "C")
        stop = len(new) - later if "C" not in axes[end:] else at + 1
        product = 1
        for size in new[at:stop]:
            product *= size
        if stop < at or (stop == at and channels != 1) or product != channels:
            return None
        out, at, index = out + "C" * (stop - at), stop, end
    return out if at == len(new) and "C" in out else None


@handles(torch.flatten, Tensor.flatten, torch.unflatten, Tensor.unflatten)
def flatten(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """Of neighbouring channel axes only."""
    x = settled(function, args[0])
    names = ("start_dim", "end_dim") if function.__name__ == "flatten" else ("dim", "sizes")
    given = {**dict(zip(names, args[1:], strict=False)), **kwargs}
    if function.__name__ == "flatten":
        first, last = axis_of(x, given.get("start_dim", 0)), axis_of(x, given.get("end_dim", -1))
        if set(x._axes[first : last + 1]) != {"C"} and first != last:
            raise refuse(function, f"it would merge the axes {x._axes[first : last + 1]} of {x._axes}", "Pool over H and W first.")
        return x._like(x._data.flatten(first, last), x._axes[:first] + x._axes[first] + x._axes[last + 1 :])
    axis = channel_axis(function, x, given["dim"])
    parts = list(given["sizes"])
    return x._like(x._data.unflatten(axis, parts), x._axes[:axis] + "C" * len(parts) + x._axes[axis + 1 :])


@handles(torch.unsqueeze, Tensor.unsqueeze)
def unsqueeze(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """A new axis of one channel, after the tiles."""
    x = settled(function, args[0])
    dim = int((*args[1:], *kwargs.values())[0])
    if not -len(x._axes) - 1 <= dim <= len(x._axes):
        raise IndexError(f"Dimension out of range for {len(x._axes)} axes: {dim}")
    dim %= len(x._axes) + 1
    if dim == 0:
        raise refuse(function, "a new axis before the images moves the tiles")
    return x._like(x._data.unsqueeze(dim), x._axes[:dim] + "C" + x._axes[dim:])


@handles(torch.squeeze, Tensor.squeeze)
def squeeze(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """A named axis of one channel removed."""
    x = settled(function, args[0])
    rest = (*args[1:], *kwargs.values())
    dim = channel_axis(function, x, rest[0] if rest and not isinstance(rest[0], tuple) else None)
    axes = x._axes[:dim] + x._axes[dim + 1 :]
    if x._data.shape[dim] != 1:
        return x
    if "C" not in axes:
        raise refuse(function, "no axis of channels would remain")
    return x._like(x._data.squeeze(dim), axes)


@handles(Tensor.__getitem__)
def index(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """x[:, a:b], x[:, i], x[:, :, ::s, ::s] and None as a new axis of channels."""
    x, where = args
    if not isinstance(x, Packed):
        raise refuse(function, "packed tiles index a plain tensor")
    settled(function, x)
    entries = list(where) if isinstance(where, tuple) else [where]
    if Ellipsis in [entry for entry in entries if entry is Ellipsis]:
        at = next(i for i, entry in enumerate(entries) if entry is Ellipsis)
        missing = len(x._axes) - sum(entry is not None and entry is not Ellipsis for entry in entries)
        entries[at : at + 1] = [slice(None)] * missing
    axes, source, steps = "", 0, []
    for entry in entries:
        if entry is None:
            axes += "C"
            continue
        axis = x._axes[source]
        if axis == "C" and isinstance(entry, int) and not isinstance(entry, Extent | bool):
            pass
        elif axis == "C" and isinstance(entry, slice | list | Tensor):
            axes += "C"
        elif isinstance(entry, slice) and axis in "HW" and entry.start in (None, 0) and entry.stop is None:
            steps.append(entry.step or 1)
            axes += axis
        elif isinstance(entry, slice) and entry == slice(None):
            axes += axis
        else:
            raise refuse(function, f"index {entry} picks among {_MEANING[axis]}",
                         "Slice channels only.")
        source += 1
    axes += x._axes[source:]
    steps = steps or [1]
    if axes[:1] != "T" or "C" not in axes or len(set(steps)) != 1:
        raise refuse(function, f"index {where} changes more than channels")
    if x._data.shape[x._axes.index("H")] % steps[0]:
        raise stride_error(function, x, steps[0])
    return x._like(x._data[tuple(entries)], axes)


def merged_channels(x: Packed) -> tuple[Tensor, list[int]]:
    """The tiles as [T, C, t, t] with all channel axes merged, and the channel sizes."""
    axes = x._axes
    order = [0, *(i for i, axis in enumerate(axes) if axis == "C"), axes.index("H"), axes.index("W")]
    data = x._data.permute(order) if order != list(range(len(axes))) else x._data
    channels = list(data.shape[1:-2])
    return (data if len(channels) == 1 else data.reshape(data.shape[0], _product(channels), *data.shape[-2:])), channels


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
