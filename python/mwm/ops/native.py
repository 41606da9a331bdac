"""The way into the compiled core: loading it, and describing tensors to it."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import torch

HOW_TO_BUILD = "run `pip install .` in the repository with a C++20 compiler (gcc >= 11 or clang >= 14)"

try:
    from mwm import _core as _CORE
except ImportError as error:
    raise ImportError(f"mwm: the native core does not load ({error}); {HOW_TO_BUILD}.") from error

if (_wanted := os.environ.get("MWM_CPU_ISA")) and not _CORE.set_isa(_wanted):
    raise ValueError(
        f"mwm: MWM_CPU_ISA must be one of {', '.join(_CORE.isas())} (what is built and this CPU has), got {_wanted!r}. "
        f"Unset it to take the best."
    )

# The numbers are those of csrc/view.h.
_CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.int64: 4,
    torch.int32: 5,
    torch.int16: 6,
    torch.uint8: 7,
    torch.bool: 8,
    torch.int8: 9,
    torch.complex64: 10,
}


FLOAT32 = _CODES[torch.float32]


def core() -> ModuleType:
    """The compiled module ``mwm._core``."""
    return _CORE


def view(tensor: torch.Tensor | None) -> tuple[Any, ...] | None:
    """(address, shape, strides in elements, dtype code) of a strided CPU tensor, as csrc/view.h reads it."""
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), _CODES[tensor.dtype]


def code(tensor: torch.Tensor) -> int:
    """The dtype code of a view."""
    return _CODES[tensor.dtype]


def threads() -> int:
    """Number of threads that a native loop may use: torch's own setting."""
    return torch.get_num_threads()
