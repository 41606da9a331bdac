"""Mask What Matters: text-guided masked image modelling for medical images.

The public names are loaded on first use, so that ``import mwm`` costs nothing and a missing optional package
concerns only those who use it.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "BackendError": "mwm.ops",
    "MaskedImageModel": "mwm.mim",
    "Packed": "mwm.sparse",
    "create_encoder": "mwm.sparse",
    "create_localizer": "mwm.localize",
    "create_policy": "mwm.masking",
    "list_policies": "mwm.masking",
    "pack": "mwm.sparse",
    "sparsify": "mwm.sparse",
}
_ROOMS = ("bench", "data", "demo", "kernels", "localize", "masking", "mim", "ops", "sparse", "study", "train", "transfer", "view")

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return importlib.import_module(f"mwm.{name}")
    raise AttributeError(f"module 'mwm' has no attribute {name!r}; its public names are {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_ROOMS})
