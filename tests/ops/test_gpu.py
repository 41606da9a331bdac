"""The doors to the GPU kernels: reasons where there is no GPU, and what loads when."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mwm import ops
from mwm.ops import backend, gpu


@pytest.fixture
def half_built(monkeypatch: pytest.MonkeyPatch) -> str:
    """An op with a Triton kernel for float32 alone, and one for CUDA and Triton in this order of trial."""
    monkeypatch.setattr(backend, "_RESOLVED", {})
    monkeypatch.setattr(backend, "_SUPPORT", {**backend._SUPPORT})
    monkeypatch.setattr(backend, "_CUDA_ORDER", {**backend._CUDA_ORDER})
    backend.declare("half_built", triton=(torch.float32,))
    return "half_built"


def test_triton_takes_cpu_tensors_in_the_interpreter_alone(half_built: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "interpreted", lambda: False)
    assert any("set TRITON_INTERPRET=1 before Python starts" in reason for reason in ops.reasons(half_built, "triton", torch.zeros(1)))
    monkeypatch.setattr(gpu, "interpreted", lambda: True)
    monkeypatch.setattr(gpu, "_load_triton", lambda: (object(), ""))
    assert ops.reasons(half_built, "triton", torch.zeros(1)) == []
    assert ops.resolve(half_built, "triton", torch.zeros(1)) == "triton"
    assert "dtype float64 (supported: float32)" in ops.reasons(half_built, "triton", torch.zeros(1, dtype=torch.float64))


def test_the_interpreter_is_never_the_automatic_choice(half_built: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "interpreted", lambda: True)
    monkeypatch.setattr(gpu, "_load_triton", lambda: (object(), ""))
    with pytest.warns(UserWarning, match="half_built runs on the plain torch reference"):
        assert ops.resolve(half_built, None, torch.zeros(1)) == "reference"
    assert ops.resolve("tile_conv", None, torch.zeros(1)) == "cpu"


@pytest.mark.parametrize(("missing", "text"), [("_load_triton", "triton is not installed"), ("_load_cuda", "the _cuda module was not built: nvcc was not found")])
def test_a_missing_part_is_the_reason(missing: str, text: str, half_built: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend.declare(half_built, cuda=(torch.float32,), triton=(torch.float32,))
    monkeypatch.setattr(gpu, missing, lambda: (None, text))
    monkeypatch.setattr(gpu, "_device_missing", lambda: "")
    assert text in ops.reasons(half_built, "triton" if "triton" in missing else "cuda")
    with pytest.raises(ImportError, match=text):
        gpu._kernels.__wrapped__("philox") if "triton" in missing else gpu.cuda()


def test_the_measured_best_comes_first_on_cuda(half_built: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "cuda_missing", lambda: "")
    monkeypatch.setattr(gpu, "triton_missing", lambda: "")
    monkeypatch.setattr(gpu, "_capability", lambda device: (9, 0))
    x = torch.empty(1, device="meta")
    monkeypatch.setattr(backend, "_against_device", lambda *_: [])

    class OnCuda:
        device, dtype, shape = torch.device("cuda", 0), torch.float32, x.shape

    for order in (("cuda", "triton", "reference"), ("triton", "cuda", "reference")):
        backend._RESOLVED.clear()
        backend.declare(half_built, cuda=(torch.float32,), triton=(torch.float32,), cuda_order=order)
        assert ops.resolve(half_built, None, OnCuda()) == order[0]


def test_old_devices_are_refused_by_their_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_capability", lambda device: (7, 5))
    assert gpu.device_too_old(torch.device("cuda", 1)) == "device cuda:1 has compute capability 7.5 (needed: 8.0)"
    monkeypatch.setattr(gpu, "_capability", lambda device: (8, 0))
    assert gpu.device_too_old(torch.device("cuda", 1)) == ""


def test_a_guard_of_a_cpu_tensor_does_nothing() -> None:
    with gpu.guard(torch.zeros(1)):
        pass


def test_importing_mwm_loads_no_kernels_and_no_triton_of_its_own() -> None:
    code = "import torch, sys; before = 'triton' in sys.modules; import mwm.ops; print(before == ('triton' in sys.modules), any('mwm.kernels' in m for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["True", "False"], done.stdout + done.stderr
