"""Functions that act on each position by itself: they run on the tiles unchanged. This list is the whole of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import aligned, lead_of, map_of, settled
from .packed import Packed
from .refusal import refuse
from .registry import handles, named

ARITHMETIC = """add sub subtract rsub mul multiply div divide true_divide floor_divide remainder fmod pow float_power neg negative
positive abs absolute sign sgn square sqrt rsqrt reciprocal exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan atan2
sinh cosh tanh asinh acosh atanh erf erfc erfinv sigmoid logit floor ceil round trunc frac clamp clip clamp_min clamp_max maximum
minimum fmax fmin lerp addcmul addcdiv where nan_to_num hypot logaddexp copysign xlogy expit
eq ne lt le gt ge isnan isinf isfinite isclose logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not
masked_fill deg2rad rad2deg"""
ACTIVATIONS = """relu relu6 elu selu celu gelu silu mish softplus softsign tanhshrink softshrink hardshrink hardtanh hardsigmoid
hardswish leaky_relu logsigmoid threshold tanh sigmoid rrelu"""
NOISE_PER_VALUE = "dropout alpha_dropout"
UNCHANGED = "clone detach contiguous float double half bfloat16 zeros_like ones_like bool int long"

IN_PLACE = tuple(f"{name}_" for name in (ARITHMETIC + " " + ACTIVATIONS + " " + NOISE_PER_VALUE).split())
_NAMES = (*ARITHMETIC.split(), *ACTIVATIONS.split(), *NOISE_PER_VALUE.split(), *UNCHANGED.split(), *IN_PLACE)
_WRITES_FIRST = frozenset(named((*IN_PLACE, "detach_")))


@handles(*named(_NAMES, (torch, F, Tensor, torch.special)))
def pointwise(function: Callable, args: tuple, kwargs: dict) -> Any:
    """function(tiles, ...), with operands brought to the tiles."""
    if kwargs.get("out") is not None:
        raise refuse(function, "out= is not supported")
    lead = lead_of(function, args, kwargs)
    if function in _WRITES_FIRST and not isinstance(args[0], Packed):
        raise refuse(function, "it would write packed tiles into a plain tensor")
    data = [aligned(function, value, lead) for value in args]
    named_data = {key: aligned(function, value, lead) for key, value in kwargs.items()}
    out = function(*data, **named_data)
    if not isinstance(out, Tensor) or out.dim() != len(lead._axes):
        raise refuse(function, "with these arguments it does not give one value per position")
    if function in _WRITES_FIRST:
        return args[0]
    return lead._like(out)


@handles(Tensor.to, Tensor.type, Tensor.cpu, Tensor.cuda)
def convert(function: Callable, args: tuple, kwargs: dict) -> Packed | str:
    """Another dtype, memory format or device; the plan goes along. Tensor.type without arguments gives the name of the type."""
    x = settled(function, args[0])
    others = [value._data if isinstance(value, Packed) else value for value in args[1:]]
    data = function(x._data, *others, **kwargs)
    if isinstance(data, str):
        return data
    new = x._like(data)
    if data.device != x._data.device:
        new._plan = x._plan.to(data.device)
    return new


@handles(Tensor.type_as)
def type_as(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """The dtype of another tensor."""
    x, other = args
    if not isinstance(x, Packed):
        return x.to(other.dtype)
    return settled(function, x)._like(x._data.to(other.dtype))


@handles(torch.prelu, F.prelu, Tensor.prelu)
def prelu(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """One slope, or one per channel of [T, C, t, t]."""
    x = map_of(function, settled(function, args[0]))
    return x._like(function(x._data, *args[1:], **kwargs))


@handles(Tensor.contiguous, Tensor.clone, torch.clone)
def contiguous(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """The same values; memory formats concern maps of four axes only."""
    x = settled(function, args[0])
    if kwargs.get("memory_format") is torch.channels_last and x._axes != "TCHW":
        raise refuse(function, f"channels_last wants [T, C, t, t], got axes {x._axes}")
    if function is Tensor.contiguous:
        # Channels-last is the layout of packed tiles. What a dense net would copy (slices, permutes) is copied here too, so that
        # work in place on the result does not reach the original.
        if x._axes == "TCHW":
            return x._like(x._data.contiguous(memory_format=torch.channels_last))
        return x._like(x._data.clone(memory_format=torch.contiguous_format))
    return x._like(function(x._data, *args[1:], **kwargs))


@handles(F.dropout2d, torch.feature_dropout, torch.feature_dropout_)
def dropout2d(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """Whole channels of an image are dropped."""
    from .randomness import drop_channels

    x = map_of(function, settled(function, args[0]))
    names = ("p", "training", "inplace") if function is F.dropout2d else ("p", "train")
    given = {**dict(zip(names, args[1:], strict=False)), **kwargs}
    p, training = given.get("p", 0.5), given.get("training", given.get("train", True))
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    out = drop_channels(x, p, None) if training else x
    if given.get("inplace") or function is torch.feature_dropout_:
        x._data.copy_(out._data) if out is not x else None
        return x
    return out


@handles(*named(["is_floating_point", "is_complex", "is_tensor", "result_type", "numel", "can_cast"], (torch,)))
def ask(function: Callable, args: tuple, kwargs: dict) -> Any:
    """Questions about type and size."""
    return function(*(value._data if isinstance(value, Packed) else value for value in args), **kwargs)


@handles(Tensor.expand_as, Tensor.requires_grad_, Tensor.retain_grad)
def expand_or_require(function: Callable, args: tuple, kwargs: dict) -> Packed:
    """gate.expand_as(map) repeats a row per image over the image's tiles; requires_grad_ marks the tiles."""
    if function is not Tensor.expand_as:
        function(args[0]._data, *args[1:], **kwargs)
        return args[0]
    value, target = args
    settled(function, target)
    return target._like(aligned(function, value, target).expand(target._data.shape))
