from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mwm import _core, ops
from mwm.ops import backend

ROOT = Path(__file__).resolve().parents[2]


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}, check=False
    )


def test_a_forced_backend_lists_its_reasons() -> None:
    region = torch.zeros(1, 4, 4, dtype=torch.complex64)
    with pytest.raises(ops.BackendError) as caught:
        ops.region_coverage(region, (2, 2), backend="cpu")
    text = str(caught.value)
    assert 'backend="cpu" cannot run region_coverage' in text
    assert "[1, 4, 4] complex64, cpu" in text
    assert "dtype complex64 (supported: float32, bfloat16, float16, float64, bool)" in text
    assert "mwm info" in text
    for name in ("triton", "cuda"):
        with pytest.raises(ops.BackendError, match="device cpu"):
            ops.region_coverage(torch.zeros(1, 4, 4), (2, 2), backend=name)
    with pytest.raises(ops.BackendError, match="unknown backend 'gpu'"):
        ops.region_coverage(torch.zeros(1, 4, 4), (2, 2), backend="gpu")


def test_what_no_backend_can_run_is_said_so_without_advice_that_does_not_help() -> None:
    with pytest.raises(ops.BackendError) as caught:
        ops.region_coverage(torch.zeros(1, 4, 4, dtype=torch.uint8), (2, 2))
    text = str(caught.value)
    assert text.startswith("no backend can run region_coverage on these inputs (x: [1, 4, 4] uint8, cpu)")
    assert "Convert the input" in text and 'backend="reference"' not in text


def test_the_native_kernels_are_the_automatic_choice_on_the_cpu() -> None:
    tensor = torch.zeros(1, 1, 2, 2)
    for row in ops.table():
        if row["cpu"] == "yes" and row["op"] not in {"build_plan", "sample_active", "random_words"}:
            assert ops.resolve(row["op"], None, tensor) == "cpu", row


def test_the_table_has_every_op_with_a_reference_and_a_native_kernel() -> None:
    rows = {row["op"]: row for row in ops.table()}
    expected = {"build_plan", "image_expand", "image_sum", "pack_tiles", "random_words", "region_coverage", "sample_active", "tile_conv", "tile_pool", "unpack_tiles"}
    assert set(rows) >= expected
    for op in expected:
        assert rows[op]["reference"] == "yes"
        assert rows[op]["cpu"] == "yes"


def test_falling_back_to_the_reference_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_RESOLVED", {})
    monkeypatch.setattr(backend, "_WARNED", set())
    backend.declare("half_built", cpu=None)
    try:
        with pytest.warns(UserWarning, match="half_built runs on the plain torch reference, which is slow: half_built has no cpu kernel"):
            assert ops.resolve("half_built", None, torch.zeros(1)) == "reference"
        assert ops.resolve("half_built", None, torch.zeros(1)) == "reference"
    finally:
        del backend._SUPPORT["half_built"]


def test_every_public_op_is_registered_with_torch_library() -> None:
    eager_only = {"batch_norm", "depthwise_conv"}  # compiled code runs torch's own, which inductor fuses; a part of tile_conv with kernels of its own
    for row in ops.table():
        assert hasattr(torch.ops.mwm, row["op"]) != (row["op"] in eager_only)


def test_the_environment_variable_forces_an_instruction_set() -> None:
    done = _python("import mwm.ops; from mwm import _core; print(_core.isa())", MWM_CPU_ISA="portable")
    assert done.stdout.strip() == "portable", done.stderr


def test_an_instruction_set_that_is_not_there_is_a_clear_error() -> None:
    done = _python("import mwm.ops", MWM_CPU_ISA="avx1024")
    assert done.returncode != 0
    assert f"MWM_CPU_ISA must be one of {', '.join(_core.isas())}" in done.stderr
    assert "'avx1024'" in done.stderr


def test_a_missing_core_names_the_command_that_builds_it() -> None:
    code = "import sys; sys.modules['mwm._core'] = None; import mwm.ops"
    done = _python(code)
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "pip install ." in done.stderr
    assert "C++20" in done.stderr


def test_the_core_links_no_openmp_and_no_torch() -> None:
    needed = subprocess.run(["readelf", "-d", _core.__file__], capture_output=True, text=True, check=False)
    if needed.returncode:
        pytest.skip("readelf is not installed")
    libraries = [line.split("[")[1].rstrip("]") for line in needed.stdout.splitlines() if "NEEDED" in line]
    assert libraries
    assert not [name for name in libraries if any(part in name for part in ("gomp", "omp", "torch", "c10", "python", "cuda"))]


def _view(tensor: torch.Tensor, **change: object) -> tuple:
    address, shape, strides, code = backend.native.view(tensor)
    parts = {"address": address, "shape": tuple(shape), "strides": tuple(strides), "code": code} | change
    return tuple(parts.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (2**40, 2**40, 4, 4)}, "overflows 64 bits"),
        ({"shape": (-1, 2, 4, 4)}, "overflows 64 bits"),
        ({"address": 0}, "no memory"),
        ({"address": 4097}, "not aligned"),
        ({"shape": (1, 2, 4), "strides": (1, 1, 1)}, "4 dimensions, got 3"),
        ({"shape": (1,) * 7, "strides": (1,) * 7}, "at most 6 dimensions"),
        ({"shape": (1, 2, 4, 5)}, "does not divide"),
    ],
)
def test_native_code_refuses_views_that_would_corrupt_memory(change: dict, message: str) -> None:
    plan = ops.build_plan(torch.ones((1, 2, 2), dtype=torch.bool), 2)
    x, out = torch.zeros(1, 2, 4, 4), torch.zeros(4, 2, 2, 2).contiguous(memory_format=torch.channels_last)
    coords, slots = _view(plan.coords), _view(plan.slots)
    _core.pack_tiles(_view(x), coords, slots, _view(out), 1)
    with pytest.raises(ValueError, match=message):
        _core.pack_tiles(_view(x, **change), coords, slots, _view(out), 1)


def test_native_code_refuses_missing_tensors_dtypes_and_strides_it_was_not_made_for() -> None:
    plan = ops.build_plan(torch.ones((1, 2, 2), dtype=torch.bool), 2)
    x, out = torch.zeros(1, 2, 4, 4), torch.zeros(4, 2, 2, 2)
    coords, slots = _view(plan.coords), _view(plan.slots)
    with pytest.raises(ValueError, match="must be a tensor, got None"):
        _core.pack_tiles(None, coords, slots, _view(out), 1)
    with pytest.raises(ValueError, match="channels-last"):
        _core.pack_tiles(_view(x), coords, slots, _view(out), 1)
    with pytest.raises(ValueError, match="wrong dtype"):
        _core.pack_tiles(_view(x), coords, _view(plan.slots.long()), _view(out.contiguous(memory_format=torch.channels_last)), 1)
    with pytest.raises(TypeError):
        _core.pack_tiles(x, coords, slots, _view(out), 1)
