"""Functions along the channels of each position: they run on the tiles once the dimension is known to be channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mwm.ops.pointwise_conv import pointwise_conv

from .operands import channel_axis, lead_of, map_of, same_places, settled
from .packed import Packed
from .refusal import refuse
from .registry import handles, named
from .strides import stride_error


def _given(args: tuple, kwargs: dict, position: int, *names: str, default: Any = None) -> Any:
    if len(args) > position:
        return args[position]
    return next((kwargs[name] for name in names if name in kwargs), default)


@handles(*named(["cat", "concat", "concatenate", "stack"], (torch,)))
def join(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """cat along channels, stack along a new axis of channels; a row per image is repeated for the tiles of the image."""
    parts, dim = args[0] if args else kwargs["tensors"], _given(args, kwargs, 1, "dim", "axis", default=0)
    if isinstance(parts, Packed):
        raise refuse(function, "it was given one map instead of a list", "Sparsify the module, or pass a list.")
    lead = lead_of(function, (parts,), {})
    new_axis = function is torch.stack
    if new_axis:
        dim = int(dim) % (len(lead._axes) + 1)
        axes = _with_axis(function, lead, dim)
    else:
        dim, axes = channel_axis(function, lead, dim), lead._axes
    return lead._like(function([_whole(function, part, lead) for part in parts], dim), axes)


def _whole(function: Callable, part: Any, lead: Packed) -> Tensor:
    if isinstance(part, Packed):
        same_places(function, part, lead)
        return part._data
    raise refuse(function, f"a plain tensor of shape {list(part.shape)} does not say where it is visible", "Pack it with the same mask.")


def _with_axis(function: Callable, x: Packed, dim: int) -> str:
    """The axes with a new channel axis at `dim`, which may not come before the tiles."""
    if dim == 0:
        raise refuse(function, "a new axis before the images moves the tiles")
    return x._axes[:dim] + "C" + x._axes[dim:]


@handles(*named(["chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split"]))
def divide(function: Callable, args: tuple, kwargs: dict) -> tuple[Packed, ...]:
    """Groups of channels."""
    x = settled(function, args[0])
    dim = channel_axis(function, x, _given(args, kwargs, 2, "dim", default=0))
    sizes = _given(args, kwargs, 1, "chunks", "split_size_or_sections", "split_size", "split_sizes", "indices_or_sections", "indices", "sections")
    name = function.__name__
    pieces = torch.tensor_split(x._data, sizes, dim) if name == "tensor_split" else (
        torch.chunk(x._data, sizes, dim) if name in ("chunk", "unsafe_chunk") else torch.split(x._data, sizes, dim))
    return tuple(x._like(piece) for piece in pieces)


@handles(*named(["narrow", "index_select"], (torch, Tensor)))
def choose(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """Some of the channels."""
    x = settled(function, args[0])
    dim = channel_axis(function, x, _given(args, kwargs, 1, "dim"))
    rest = [value for key, value in kwargs.items() if key not in ("dim", "input")]
    return x._like(function(x._data, dim, *args[2:], *rest))


@handles(*named(["unbind"], (torch, Tensor)))
def unbind(function: Callable, args: tuple, kwargs: dict) -> tuple[Packed, ...]:
    """One map per entry of an axis of channels."""
    x = settled(function, args[0])
    dim = channel_axis(function, x, _given(args, kwargs, 1, "dim", default=0))
    axes = x._axes[:dim] + x._axes[dim + 1 :]
    return tuple(x._like(piece, axes) for piece in torch.unbind(x._data, dim))


@handles(*named(["softmax", "log_softmax", "softmin", "glu", "flip", "roll"], (torch, F, Tensor)))
def along_channels(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """Functions with a dimension, over channels."""
    x = settled(function, args[0])
    if function.__name__ == "roll":
        dims = _given(args, kwargs, 2, "dims")
    elif function.__name__ == "glu":
        dims = _given(args, kwargs, 1, "dim", default=-1)
    elif function.__name__ == "flip":
        dims = kwargs["dims"] if "dims" in kwargs else args[1] if len(args) == 2 else args[1:]
    else:
        dims = _given(args, kwargs, 1, "dim", "dims")
    for dim in dims if isinstance(dims, list | tuple) else (dims,):
        channel_axis(function, x, dim)
    return x._like(function(x._data, *args[1:], **kwargs))


@handles(F.normalize)
def normalize(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """Unit length over channels."""
    x = settled(function, args[0])
    channel_axis(function, x, _given(args, kwargs, 2, "dim", default=1))
    return x._like(F.normalize(x._data, *args[1:], **kwargs))


@handles(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm)
def norm_over_channels(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """Layer norm and RMS norm whose normalised axes are the last ones and all channels."""
    x = settled(function, args[0])
    shape = _given(args, kwargs, 1, "normalized_shape")
    if x._axes[-len(shape) :].strip("C"):
        raise refuse(function, f"the last {len(shape)} of the axes {x._axes} are not all channels", "Normalise over channels, last.")
    return x._like(function(x._data, *args[1:], **kwargs))


@handles(F.linear)
def linear(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """A linear layer over the last axis of a channels-last block."""
    x = args[0]
    if not isinstance(x, Packed):
        raise refuse(function, "packed tiles stand in the place of a weight")
    settled(function, x)
    if x._axes[-1] != "C":
        raise refuse(function, f"its last axis must be channels, got axes {x._axes}", "Permute to channels last, or pool over H and W first.")
    weight = _given(args, kwargs, 1, "weight")
    if x._axes == "THWC" and x._data.device.type == "cpu" and not torch.compiler.is_compiling() and x._data.shape[0] > 0:
        # The same product as a 1x1 convolution of channels-last memory runs about twice as fast on CPUs.
        out = pointwise_conv(x._data.permute(0, 3, 1, 2), weight[:, :, None, None], _given(args, kwargs, 2, "bias"))
        return x._like(out.permute(0, 2, 3, 1))
    return x._like(F.linear(x._data, *args[1:], **kwargs))


@handles(F.local_response_norm, F.channel_shuffle, F.pixel_shuffle, F.pixel_unshuffle, *named(["channel_shuffle", "native_channel_shuffle",
         "pixel_shuffle", "pixel_unshuffle"], (torch,)))
def inside_tiles(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """Functions of the channels of a position, or of a square that no tile border crosses."""
    x = map_of(function, settled(function, args[0]))
    if function.__name__ == "pixel_unshuffle":
        factor = _given(args, kwargs, 1, "downscale_factor")
        if x._data.shape[-1] % factor:
            raise stride_error(function, x, factor)
    return x._like(function(x._data, *args[1:], **kwargs).contiguous(memory_format=torch.channels_last))
