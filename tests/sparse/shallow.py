"""The same network with fewer blocks: what repeats one after the other, alike in layers and sizes, stays once or twice."""

from __future__ import annotations

import hashlib
import itertools
import re
from typing import Any

from torch import nn

from mwm.sparse.encoder import Pyramid


def make_shallow(net: nn.Module, repeats: int = 2) -> int:
    """Drop blocks that equal the one before them from every chain of blocks in `net`, in place; each kind of layer stays, at its own width.

    Args:
        net: any network.
        repeats: how many equal blocks in a row may stay.

    Returns:
        The number of blocks dropped.
    """
    dropped = 0
    for module in list(net.modules()):
        if type(module).forward is not nn.Sequential.forward and type(module).__name__ not in _CHAINS:
            continue
        runs: list[tuple[str, list[str]]] = []
        for name, child in module._modules.items():
            layers = fingerprint(child) if _may_go(child) else name
            if runs and runs[-1][0] == layers:
                runs[-1][1].append(name)
            else:
                runs.append((layers, [name]))
        # The last ones stay, since they are those whose output a pyramid returns.
        kept = [name for _, names in runs for name in names[-repeats:]]
        dropped += len(module._modules) - len(kept)
        module._modules = {name: module._modules[name] for name in kept}
    if isinstance(net, Pyramid):
        left = {name for name, _ in net.named_modules()}
        net.steps = tuple(step for step in net.steps if step in left)
    return dropped


def fingerprint(net: nn.Module) -> str:
    """Equal for networks of the same classes, settings and shapes of parameters, whatever the values."""
    text = hashlib.sha256()
    for name, module in net.named_modules():
        settings = sorted((key, _plain(value)) for key, value in module.__dict__.items() if not key.startswith("_") and key not in _NAMES)
        shapes = [(key, tuple(p.shape)) for key, p in (*module._parameters.items(), *module._buffers.items()) if p is not None]
        text.update(repr((name, f"{type(module).__module__}.{type(module).__qualname__}", settings, shapes)).encode())
    return text.hexdigest()


def kind(module: nn.Module) -> str:
    """Equal for networks that differ in width, in the number of blocks that follow one another alike, and in constants such as eps only."""
    settings = sorted((key, _kind_of(key, value, module)) for key, value in module.__dict__.items() if not key.startswith("_") and key not in _NAMES)
    shapes = [(key, tuple(p.shape[2:])) for key, p in (*module._parameters.items(), *module._buffers.items()) if p is not None]
    children = [(name, kind(child)) for name, child in module._modules.items() if child is not None]
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) or type(module).__name__ in _CHAINS:
        children = [(str(i), child) for i, (child, _) in enumerate(itertools.groupby(child for _, child in children))]
    return hashlib.sha256(repr((f"{type(module).__module__}.{type(module).__qualname__}", settings, shapes, children)).encode()).hexdigest()[:16]


_CHAINS = {"RegStage"}  # run their children one after the other without being an nn.Sequential
_NAMES = {"default_cfg", "pretrained_cfg", "feature_info", "drop_prob", "beta"}  # what tells blocks apart, but not their layers


def _kind_of(key: str, value: Any, module: nn.Module) -> str:
    if key == "groups" and isinstance(value, int):
        return "1" if value == 1 else "depthwise" if value == getattr(module, "in_channels", None) else "groups"
    if isinstance(value, bool | str) or value is None:
        return repr(value)
    if isinstance(value, tuple | list):
        return repr([_kind_of("", item, module) for item in value])
    return repr(value) if isinstance(value, int) and value < 12 else type(value).__name__


def _plain(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value)) if not isinstance(value, nn.Module) else ""


def _may_go(module: nn.Module) -> bool:
    """Whether a net without it would still have the same strides."""
    return any(True for _ in module.parameters()) and all(getattr(layer, "stride", 1) in (1, (1, 1)) for layer in module.modules())
