"""The way to the GPU kernels: loading `mwm._cuda` and `mwm.kernels` at first use, why they cannot run, and where to launch them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import shutil
from types import ModuleType

import torch
from torch import Tensor

LEAST_CAPABILITY = (8, 0)


@functools.cache
def _load_cuda() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("mwm._cuda"), ""
    except ModuleNotFoundError:
        return None, f"the _cuda module was not built: {cuda_build()}"
    except ImportError as error:
        return None, f"the _cuda module does not load: {error}"


@functools.cache
def _load_triton() -> tuple[ModuleType | None, str]:
    try:
        triton = importlib.import_module("triton")
    except ModuleNotFoundError:
        return None, "triton is not installed"
    except Exception as error:
        return None, f"triton does not load: {error}"
    if not interpreted() and not any(map(shutil.which, [os.environ.get("CC") or "gcc", "gcc", "clang"])):
        return None, "triton finds no C compiler (gcc or clang, or set CC)"
    return triton, ""


@functools.cache
def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 was set before they were loaded."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true", "y", "yes")


def cuda_build() -> str:
    """What the build wrote about the CUDA kernels: for which devices they are, or why there are none."""
    try:
        return importlib.import_module("mwm._cuda_build").STATE
    except ModuleNotFoundError:
        return "the build left no word about CUDA"


def cuda() -> ModuleType:
    """The compiled module ``mwm._cuda``.

    Raises:
        ImportError: It was not built or does not load; the message is `cuda_missing()`.
    """
    module, why = _load_cuda()
    if module is None:
        raise ImportError(f"mwm: {why}")
    return module


def cuda_missing() -> str:
    """Why the CUDA kernels cannot run in this process; empty when they can."""
    return _load_cuda()[1] or _device_missing()


def triton_kernels(basename: str) -> ModuleType:
    """The module ``mwm.kernels.<basename>``, imported at first use.

    Raises:
        ImportError: triton is missing; the message is `triton_missing()`.
    """
    return _kernels(basename)


@functools.cache
def _kernels(basename: str) -> ModuleType:
    if _load_triton()[0] is None:
        raise ImportError(f"mwm: {_load_triton()[1]}")
    return importlib.import_module(f"mwm.kernels.{basename}")


def triton_missing() -> str:
    """Why the Triton kernels cannot run in this process; empty when they can."""
    return _load_triton()[1] or ("" if interpreted() else _device_missing())


def device_too_old(device: torch.device) -> str:
    """Why the kernels were not made for this CUDA device; empty when they were."""
    capability = _capability(device)
    if capability >= LEAST_CAPABILITY:
        return ""
    return f"device {device} has compute capability {capability[0]}.{capability[1]} (needed: {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]})"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _device_missing() -> str:
    return "" if torch.cuda.is_available() else "no CUDA device is visible"


_NO_CHANGE = contextlib.nullcontext()


def guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Context in which the tensor's CUDA device is current, as launches need; nothing where it is, or for a tensor on the CPU."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NO_CHANGE
    return torch.cuda.device_of(tensor)


def stream(tensor: Tensor) -> int:
    """Address of torch's current stream on the tensor's CUDA device, as `mwm._cuda` takes it."""
    return stream_on(tensor.device)


def stream_on(device: torch.device) -> int:
    """The same of a CUDA device."""
    # The public way makes two objects to read one number, at ten times the time.
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return torch.cuda.current_stream(device).cuda_stream if raw is None or device.index is None else raw(device.index)


def launch(tensor: Tensor) -> tuple[int, int]:
    """(device index, stream): the last two arguments of every function of `mwm._cuda`. Zeros for a tensor on the CPU."""
    return (tensor.device.index, stream(tensor)) if tensor.is_cuda else (0, 0)


def as_bytes(x: Tensor) -> Tensor:
    """Bools as uint8, which Triton reads and writes as they lie in memory; other tensors as they are."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x
