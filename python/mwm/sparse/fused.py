"""Additions and ReLUs right after a batch norm, taken into its pass; everywhere else they act per position like the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import same_places
from .packed import Packed
from .pointwise import pointwise
from .registry import handles, named

_RELU = tuple(named(["relu", "relu_"]))
_RELU6 = (F.relu6,)
_HARDTANH = tuple(named(["hardtanh", "hardtanh_"], (F,)))
_IN_PLACE = frozenset(named(["relu_", "add_", "hardtanh_"]))


@handles(*_RELU, *_RELU6)
def relu(function: Callable, args: tuple, kwargs: dict) -> Any:
    """max(x, 0), and min(., 6) for relu6."""
    x = args[0] if args else kwargs.get("input")
    waiting = x._pending if isinstance(x, Packed) else None
    if waiting is None:
        return pointwise(function, args, kwargs)
    in_place = kwargs.get("inplace", args[1] if len(args) > 1 else False)
    return _activated(x, "relu6" if function in _RELU6 else "relu", function in _IN_PLACE or in_place)


@handles(*_HARDTANH)
def hardtanh(function: Callable, args: tuple, kwargs: dict) -> Any:
    """Clamp to [min_val, max_val]; with 0 and 6 it is ReLU6, as torch.nn.ReLU6 calls it."""
    given = {**dict(zip(("input", "min_val", "max_val", "inplace"), args, strict=False)), **kwargs}
    x = given.get("input")
    if not isinstance(x, Packed) or x._pending is None or (given.get("min_val", -1.0), given.get("max_val", 1.0)) != (0, 6):
        return pointwise(function, args, kwargs)
    return _activated(x, "relu6", function in _IN_PLACE or given.get("inplace", False))


def _activated(x: Packed, activation: str, in_place: bool) -> Packed:
    """Compute the norm that x waits for, with an activation."""
    data = x._pending.result(activation)
    if not in_place:
        return x._like(data)
    x._settle(data)
    return x


@handles(*named(["add", "add_"], (torch, Tensor)))
def add(function: Callable, args: tuple, kwargs: dict) -> Any:
    """x + y of two packed maps, or a map and a number, parameter or row per image."""
    if len(args) == 2 and not kwargs and isinstance(args[0], Packed) and isinstance(args[1], Packed):
        x, other = args
        if x._pending is None and other._pending is not None and function not in _IN_PLACE:
            x, other = other, x
        waiting = x._pending
        if waiting is not None and x is not other:
            same_places(function, other, x)
            residual = other._data
            if waiting.takes(residual):
                if function not in _IN_PLACE:
                    return x._wait(waiting.plus(residual))
                x._pending = waiting.plus(residual)
                return x
    return pointwise(function, args, kwargs)
