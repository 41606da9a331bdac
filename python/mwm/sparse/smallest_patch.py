"""The smallest patch that every stride of a network divides, found by trying; only an error asks for it."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import torch
from torch import nn

from .packed import Packed, pack
from .refusal import NAME, StrideError

LARGEST = 1024  # pixels; a network beyond that stride is not searched to its end
_searching = False


def smallest_patch(reached: int) -> int:
    """The smallest legal patch in pixels of the sparsified net whose forward is running, at least `reached`.

    Runs a copy of the net, without hooks and in eval mode, on one visible patch, enlarging the patch until every stride passes.
    Where that is not possible the answer is `reached`, which passes the layer at hand.
    """
    global _searching
    call = None if _searching else _running_net()
    if call is None:
        return reached
    _searching = True
    try:
        return _search(*call, reached)
    except Exception:
        return reached
    finally:
        _searching = False


def _search(net: nn.Module, like: Packed, patch: int) -> int:
    net = copy.deepcopy(net).eval()
    for module in net.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    tiles = like._data
    while patch <= LARGEST:
        images = torch.zeros((1, tiles.shape[1], patch, patch), dtype=tiles.dtype, device=tiles.device)
        try:
            with torch.no_grad():
                net(pack(images, torch.ones(1, 1, 1, dtype=torch.bool, device=tiles.device)))
        except StrideError as error:
            patch = math.lcm(patch, error.stride)
        else:
            return patch
    return patch


def _running_net() -> tuple[nn.Module, Packed] | None:
    """The outermost sparsified net on the stack, and the packed images it was called with."""
    frame: Any = sys._getframe(2)
    found = None
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "_call_impl" else None
        if isinstance(owner, nn.Module) and owner.__dict__.get(NAME) == "":
            images = next((value for value in frame.f_locals.get("args", ()) if isinstance(value, Packed)), None)
            found = (owner, images) if images is not None else found
        frame = frame.f_back
    return found
