"""Packed tiles and the layers that read them: any CNN, at the price of what is visible."""

from __future__ import annotations

from . import methods
from .convert import is_sparsified, sparsify
from .encoder import create_encoder
from .packed import Packed, pack
from .randomness import random_state
from .refusal import PackedError, StrideError

methods.install()

__all__ = ["Packed", "PackedError", "StrideError", "create_encoder", "is_sparsified", "pack", "random_state", "sparsify"]
