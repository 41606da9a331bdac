"""Saying no by name: which function, in which module, why, and what to do instead."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import resolve_name

NAME = "_mwm_name"  # attribute that `sparsify` leaves on every module: its dotted name below the root


class PackedError(TypeError):
    """A function that cannot run on packed tiles with the meaning it has on a dense map."""


class StrideError(ValueError):
    """A patch that the strides of a network do not divide.

    Attributes:
        stride: what the patch would have to be a multiple of to pass this layer, pixels.
    """

    def __init__(self, message: str, stride: int) -> None:
        super().__init__(message)
        self.stride = stride


def refuse(function: Callable | str, reason: str, fix: str = "") -> PackedError:
    """The error for a function that packed tiles do not take; names the module whose forward is running.

    Args:
        function: what was called.
        reason: why its answer would be wrong, without a full stop.
        fix: what to do instead, a sentence.
    """
    return PackedError(f"mwm.Packed: {function_name(function)} cannot run on packed tiles{location()}: {reason}. {fix}".rstrip())


def function_name(function: Callable | str) -> str:
    """Full name of a torch function, such as torch.nn.functional.conv1d."""
    if isinstance(function, str):
        return function
    if torch.compiler.is_compiling():
        return getattr(function, "__name__", "a function")
    name = resolve_name(function)
    return name or f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}".lstrip(".")


def location() -> str:
    """" in module 'layer1.0.conv1' (Conv2d)" for the sparsified module whose forward is running, else nothing."""
    if torch.compiler.is_compiling():
        return ""
    module = calling_module()
    if module is None:
        return ""
    name = module.__dict__.get(NAME)
    return f" in module {name!r} ({type(module).__name__})" if name else f" in module {type(module).__name__}"


def calling_module() -> nn.Module | None:
    """The innermost nn.Module whose method is running, read from the stack: calls that succeed then pay nothing."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module):
                return owner
        frame = frame.f_back
    return None


def inside_sparsified() -> bool:
    """Whether the innermost running module belongs to a sparsified net."""
    module = calling_module()
    return module is not None and NAME in module.__dict__
