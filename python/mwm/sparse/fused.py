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
_IN_PLACE = frozenset(named(["relu_", "add_"]))


@handles(*_RELU, *_RELU6)
def relu(function: Callable, args: tuple, kwargs: dict) -> Any:
    """max(x, 0), and min(., 6) for relu6."""
    x = args[0] if args else kwargs.get("input")
    waiting = x._pending if isinstance(x, Packed) else None
    if waiting is None:
        return pointwise(function, args, kwargs)
    data = waiting.result("relu6" if function in _RELU6 else "relu")
    in_place = function in _IN_PLACE or kwargs.get("inplace", args[1] if len(args) > 1 else False)
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
