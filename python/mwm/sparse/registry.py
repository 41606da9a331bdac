"""Which torch functions packed tiles take, and what each then means. What is not listed here is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F

Handler = Callable[[Callable, tuple, dict], Any]
HANDLERS: dict[Callable, Handler] = {}
_NAMESPACES = (torch, F, torch.Tensor, torch.special, torch.linalg)


def handles(*functions: Callable) -> Callable[[Handler], Handler]:
    """Decorator: the handler answers for these functions; it is called as handler(function, args, kwargs)."""

    def add(handler: Handler) -> Handler:
        for function in functions:
            HANDLERS[function] = handler
        return handler

    return add


def named(names: Iterable[str], namespaces: Iterable[Any] = _NAMESPACES) -> list[Callable]:
    """The functions of these names in torch, torch.nn.functional and torch.Tensor, as far as this torch has them."""
    found = [getattr(space, name, None) for name in names for space in namespaces]
    return [function for function in found if callable(function)]


def dispatch(function: Callable, args: tuple, kwargs: dict) -> Any:
    """Run a torch function on packed tiles, or refuse it by name."""
    handler = HANDLERS.get(function)
    if handler is None:
        from .refusal import refuse

        raise refuse(function, "it is not known to act per position, per channel or per image",
                     "Compute it on x.unpack(), a dense map that is zero where hidden, if that is what you mean.")
    return handler(function, args, kwargs)
