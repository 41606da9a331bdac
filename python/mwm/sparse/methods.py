"""Tensor's methods and operators on packed tiles: each is the torch function of the same name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import channels, fused, norms, pointwise, reductions, shapes, windows
from .packed import Packed
from .registry import HANDLERS, dispatch

ROOMS = (channels, norms, pointwise, fused, reductions, shapes, windows)

_OPERATORS = {
    "add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "floordiv": "floor_divide", "mod": "remainder", "pow": "pow",
    "and": "bitwise_and", "or": "bitwise_or", "xor": "logical_xor",
}
_COMPARISONS = {"eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge"}
_REFUSED = "matmul rmatmul lshift rlshift rshift rrshift contains float int complex"
_UNARY = {"neg": "neg", "abs": "abs", "invert": "bitwise_not", "pos": "positive"}


def _method(handler: Callable, function: Callable, name: str) -> Callable:
    def method(self: Packed, *args: Any, **kwargs: Any) -> Any:
        return handler(function, (self, *args), kwargs)

    method.__name__, method.__doc__ = name, f"torch.Tensor.{name} on packed tiles."
    return method


def _reflected(handler: Callable, function: Callable, name: str) -> Callable:
    def method(self: Packed, other: Any) -> Any:
        return handler(function, (other, self), {})

    method.__name__, method.__doc__ = name, f"torch.Tensor.{name} on packed tiles."
    return method


def _refusing(function: Callable, name: str) -> Callable:
    def method(self: Packed, *args: Any) -> Any:
        return dispatch(function, (self, *args), {})

    method.__name__, method.__doc__ = name, f"Refused by name, as torch.Tensor.{name} is."
    return method


def install() -> None:
    """Give Packed a method for every Tensor method that has a handler, and the operators."""
    for name in dir(Tensor):
        function = getattr(Tensor, name)
        if callable(function) and function in HANDLERS and name not in Packed.__dict__:
            setattr(Packed, name, _method(HANDLERS[function], function, name))
    for python, name in (_OPERATORS | _COMPARISONS | _UNARY).items():
        function = getattr(torch, name)
        setattr(Packed, f"__{python}__", _method(HANDLERS[function], function, f"__{python}__"))
        if python in _OPERATORS:
            setattr(Packed, f"__r{python}__", _reflected(HANDLERS[function], function, f"__r{python}__"))
            in_place = getattr(Tensor, f"{name}_")
            setattr(Packed, f"__i{python}__", _method(HANDLERS[in_place], in_place, f"__i{python}__"))
    for python in _REFUSED.split():
        setattr(Packed, f"__{python}__", _refusing(getattr(Tensor, f"__{python}__"), f"__{python}__"))
    Packed.__hash__ = object.__hash__
    Packed.__getitem__ = _method(HANDLERS[Tensor.__getitem__], Tensor.__getitem__, "__getitem__")
