"""The CUDA sources as nvcc sees them, and the module that the build made of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulator
import pytest

from mwm.ops import gpu

#: What ptxas may put aside around the slow path of a division; a loop that spills shows as hundreds of bytes.
SPILL_BYTES = 32
REGISTERS = 128


def _compile(source: Path, scratch: Path) -> list[str]:
    """What is wrong with a source, compiled for sm_90."""
    command = ["nvcc", "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-fPIC,-Wall", "-arch=sm_90", "-Xptxas", "-v", "-cubin"]
    done = subprocess.run([*command, "-o", f"{scratch}/{source.name}.cubin", str(source)], capture_output=True, text=True)
    if done.returncode:
        return [f"{source.name}: {done.stdout}{done.stderr}"]
    kernels = re.findall(r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", done.stderr, re.S)
    assert kernels, f"{source.name}: ptxas names no kernel"
    return [f"{source.name}: {name} spills {spill} bytes, has {registers} registers" for name, spill, registers in kernels
            if int(spill) > SPILL_BYTES or int(registers) > REGISTERS]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_every_source_compiles_for_sm_90_without_warnings_or_spills(tmp_path: Path) -> None:
    sources = [path for path in emulator.sources() if path.suffix == ".cu"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wrong = [line for lines in pool.map(lambda source: _compile(source, tmp_path), sources) for line in lines]
    assert len(sources) > 5
    assert not wrong, "\n".join(wrong)


def test_the_build_says_in_one_line_what_became_of_cuda() -> None:
    state = gpu.cuda_build()
    assert state and "\n" not in state


def test_the_module_is_imported_without_a_driver_and_brings_no_library() -> None:
    """In a process without torch, by its path: only the C++ runtime may come along."""
    module, why = gpu._load_cuda()
    if module is None:
        pytest.skip(why)
    text = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('_cuda', sys.argv[1]); module = importlib.util.module_from_spec(spec);"
        "spec.loader.exec_module(module); assert module.build_plan; print(open('/proc/self/maps').read())"
    )
    done = subprocess.run([sys.executable, "-c", text, module.__file__], capture_output=True, text=True, check=True)
    brought = {name for name in re.findall(r"lib[a-z0-9_]+", done.stdout) if re.match(r"lib(cuda|cudart|torch|c10|gomp|omp|iomp)", name)}
    assert not brought


def test_every_kernel_of_the_list_has_a_source_of_its_name_or_its_family() -> None:
    """One op, one basename: what ops_cuda.h declares is defined in csrc/cuda."""
    names = set(re.findall(r"^  X\((\w+),", (emulator.CSRC / "ops_cuda.h").read_text(), re.M))
    defined = {name for path in (emulator.CSRC / "cuda").glob("*.cu") for name in re.findall(r"^void (\w+)\(const View&", path.read_text(), re.M)}
    assert names <= defined
    assert len(names) >= 12
