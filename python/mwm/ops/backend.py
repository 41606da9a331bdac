"""Which implementation of an op runs: a table, and the reasons why one cannot.

Nothing here is process-wide state: a choice depends on the op, the argument `backend`, and the tensors alone.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from . import gpu, native

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool)
ANY = (*FLOATS, *INTEGERS, torch.int8, torch.complex64)
#: What the GPU kernels compute in; float64 is left to the reference.
GPU_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
NAMES = ("cpu", "cuda", "triton", "reference")


class BackendError(RuntimeError):
    """A backend asked for by name cannot run the op on these inputs; the message lists the reasons."""


@dataclass(frozen=True)
class Support:
    """What one implementation of one op accepts.

    Attributes:
        devices: Device types.
        dtypes: Dtypes of its first (main) tensor.
    """

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]


_REFERENCE_DEVICES = ("cpu", "cuda", "mps", "xpu")
_SUPPORT: dict[str, dict[str, Support]] = {}
_CUDA_ORDER: dict[str, tuple[str, ...]] = {}
_RESOLVED: dict[tuple, str] = {}
_WARNED: set[str] = set()


def declare(
    op: str,
    *,
    cpu: tuple[torch.dtype, ...] | None = None,
    cuda: tuple[torch.dtype, ...] | None = None,
    triton: tuple[torch.dtype, ...] | None = None,
    reference: tuple[torch.dtype, ...] = ANY,
    cuda_order: tuple[str, ...] = ORDER["cuda"],
) -> None:
    """Enter an op into the table.

    Args:
        op: Name of the op, e.g. ``"tile_conv"``.
        cpu, cuda, triton: Dtypes that the kernel takes; None where there is no such kernel.
        reference: Dtypes that the plain torch version takes.
        cuda_order: Which backend is tried first on CUDA tensors; put the one that was measured to be the fastest first.
    """
    row = {"reference": Support(_REFERENCE_DEVICES, reference)}
    for name, dtypes, devices in (("cpu", cpu, ("cpu",)), ("cuda", cuda, ("cuda",)), ("triton", triton, ("cuda",))):
        if dtypes is not None:
            row[name] = Support(devices, dtypes)
    _SUPPORT[op] = row
    _CUDA_ORDER[op] = cuda_order


def reasons(op: str, backend: str, *tensors: torch.Tensor) -> list[str]:
    """Why `backend` cannot run `op` on these tensors; an empty list means that it can.

    Args:
        op: Name of the op, e.g. ``"tile_conv"``.
        backend: "cpu", "cuda", "triton" or "reference".
        tensors: The op's tensor arguments; the first one decides on the dtype.
    """
    if backend not in NAMES:
        return [f"unknown backend {backend!r} (known: {', '.join(NAMES)})"]
    support = _SUPPORT[op].get(backend)
    if support is None:
        return [f"{op} has no {backend} kernel in this version"]
    missing = {"cuda": gpu.cuda_missing, "triton": gpu.triton_missing}.get(backend, str)()
    found = [missing] if missing else []
    for tensor in tensors[:1]:
        found += _against_device(backend, tensor.device, support.devices)
        if tensor.dtype not in support.dtypes:
            found.append(f"dtype {_short(tensor.dtype)} (supported: {', '.join(map(_short, support.dtypes))})")
    return found


def _against_device(backend: str, device: torch.device, supported: tuple[str, ...]) -> list[str]:
    if backend == "triton" and device.type == "cpu":
        return [] if gpu.interpreted() else ["device cpu (supported: cuda, and cpu in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts)"]
    if device.type not in supported:
        return [f"device {device.type} (supported: {', '.join(supported)})"]
    # Where no device is visible there is nothing to ask.
    old = gpu.device_too_old(device) if backend in ("cuda", "triton") and torch.cuda.is_available() else ""
    return [old] if old else []


def resolve(op: str, backend: str | None, *tensors: torch.Tensor) -> str:
    """Name of the backend that runs `op`: the one asked for, or the first of the device's order without a reason against it.

    Raises:
        BackendError: `backend` was asked for by name and cannot run these inputs, or none can.
    """
    first = tensors[0]
    key = (op, backend, first.device, first.dtype)
    known = _RESOLVED.get(key)
    if known is not None:
        return known
    if backend:
        if found := reasons(op, backend, *tensors):
            raise BackendError(_refusal(op, f'backend="{backend}" cannot', tensors, found))
        chosen = backend
    else:
        order = _CUDA_ORDER[op] if first.device.type == "cuda" else ORDER.get(first.device.type, ("reference",))
        against = {name: reasons(op, name, *tensors) for name in order}
        chosen = next((name for name in order if not against[name]), "")
        if not chosen:
            lines = [f"{name}: {reason}" for name, found in against.items() for reason in found]
            raise BackendError(_refusal(op, "no backend can", tensors, lines, "Convert the input; `mwm info` lists what runs here."))
        if chosen == "reference" and op not in _WARNED:
            _WARNED.add(op)
            lines = [reason for name in order[:-1] for reason in against[name]]
            warnings.warn(f"{op} runs on the plain torch reference, which is slow: {'; '.join(lines)}", stacklevel=3)
    _RESOLVED[key] = chosen
    return chosen


def has_kernel(op: str, *tensors: torch.Tensor) -> bool:
    """Whether the automatic choice is a kernel of this package; what asks so has something better than the reference at hand."""
    first = tensors[0]
    key = ("has_kernel", op, first.device, first.dtype)
    if key not in _RESOLVED:
        order = _CUDA_ORDER[op] if first.device.type == "cuda" else ORDER.get(first.device.type, ())
        _RESOLVED[key] = next((name for name in order if name != "reference" and not reasons(op, name, *tensors)), "")
    return bool(_RESOLVED[key])


def table() -> list[dict[str, str]]:
    """One row per op for ``mwm info``: {"op": name, "cpu": "yes" | reason, "cuda": …, "triton": …, "reference": …}."""
    rows = []
    for op in sorted(_SUPPORT):
        row = {"op": op}
        for backend in NAMES:
            row[backend] = "; ".join(reasons(op, backend)) or "yes"
        rows.append(row)
    return rows


def cpu_isa() -> str:
    """Instruction set of the CPU kernels in use: "avx512bf16", "avx512", "avx2" or "portable"."""
    return native.core().isa()


def thread_runtime() -> str:
    """What runs the CPU kernels' parallel loops, e.g. "openmp (GOMP_parallel in …/libgomp.so.1)"."""
    return native.core().thread_runtime()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refusal(op: str, subject: str, tensors: tuple[torch.Tensor, ...], found: list[str],
             advice: str = 'Use backend="reference" or leave it out; `mwm info` lists what runs here.') -> str:
    first = tensors[0]
    lines = "\n".join(f"  {reason}" for reason in found)
    return f"{subject} run {op} on these inputs (x: {list(first.shape)} {_short(first.dtype)}, {first.device}):\n{lines}\n  {advice}"
