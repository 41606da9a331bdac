"""The Triton kernels on a machine without a GPU: run by Triton's interpreter, and compiled to sm_90 code."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    rest = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=900, env={**rest, **environment}, check=False)


@pytest.mark.slow
@pytest.mark.timeout(960)
def test_every_triton_kernel_equals_the_oracle_in_the_interpreter() -> None:
    """Four processes, as many at a time as there are cores: the interpreter runs on one."""
    pytest.importorskip("triton")
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "kernels").glob("test_*.py"))
    shares = [files[i::4] for i in range(4)]
    words = "-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider"
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        runs = list(pool.map(lambda share: _python(*words, *share, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"), shares))
    for done in runs:
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert " passed" in done.stdout.splitlines()[-1], done.stdout[-2000:]


@pytest.mark.slow
def test_every_launch_of_the_ops_binds_and_compiles_with_the_arguments_they_pass() -> None:
    pytest.importorskip("triton")
    done = _python("tests/kernels/launches.py", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("ok _") >= 15, done.stdout


def test_the_offline_compile_sees_a_wrap_a_spill_too_much_shared_memory_and_a_type_error() -> None:
    pytest.importorskip("triton")
    lines = [line for line in _python("tests/kernels/compile_sm90.py", "tests/kernels/known_bad.py").stdout.splitlines() if ", ones:" not in line][1:]
    reasons = ["32-bit product", "32-bit product", "registers spilled", "bytes of shared memory, sm_90 has 232448", "Error"]
    assert len(lines) == len(reasons)
    for line, reason in zip(lines, reasons, strict=True):
        assert line.startswith("BAD") and reason in line, line


@pytest.mark.slow
@pytest.mark.timeout(960)
def test_every_triton_kernel_compiles_to_sm_90_without_spills() -> None:
    pytest.importorskip("triton")
    done = _python("tests/kernels/compile_sm90.py")
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if not line.startswith("ok ")) + done.stderr[-2000:]
    assert done.stdout.count("\nok ") > 10, done.stdout
