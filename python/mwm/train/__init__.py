"""Pre-training: configuration, loop, checkpoints, the exported encoder. The only room that knows all the others."""

from __future__ import annotations

import importlib
from typing import Any

from mwm.train.config import PretrainConfig, TrainError

_HOME = {"load_encoder": "mwm.train.export", "pretrain": "mwm.train.loop"}  # on first use: the settings alone cost nothing

__all__ = ["PretrainConfig", "TrainError", "load_encoder", "pretrain"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mwm.train' has no attribute {name!r}")
