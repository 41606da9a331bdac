"""The CUDA sources as a module for the CPU: built once by the C++ compiler against emulate.h, then called by the real glue of mwm.ops."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mwm.ops import backend, gpu

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DMWM_EMULATE"]


if os.environ.get("MWM_EMULATE_SANITIZE"):
    # scripts/sanitize.sh cuda: the same tests with every access and every shift of the kernels checked.
    FLAGS += ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def sources() -> list[Path]:
    """The files of the module, as CMakeLists.txt takes them."""
    return [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "cuda_module.cpp", CSRC / "fail.cpp"]


def build() -> Path:
    """Folder with the built module; kept between sessions under the hash of everything that went into it.

    Raises:
        RuntimeError: there is no C++ compiler or no pybind11, or the sources do not compile.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise RuntimeError("there is no C++ compiler (g++, or CXX)")
    try:
        import pybind11
    except ModuleNotFoundError as error:
        raise RuntimeError("there is no pybind11 (pip install '.[test]')") from error

    includes = [f"-I{folder}" for folder in (Path(__file__).parent, CSRC, sysconfig.get_paths()["include"], pybind11.get_include())]
    inputs = sorted(path for folder in (CSRC, Path(__file__).parent) for path in folder.rglob("*") if path.suffix in {".h", ".cu", ".cpp"} and path.parent.name != "cpu")
    digest = hashlib.sha256(" ".join([compiler, *FLAGS, sysconfig.get_config_var("EXT_SUFFIX")]).encode() + b"".join(path.read_bytes() for path in inputs))
    folder = Path(tempfile.gettempdir()) / f"mwm-emulated-{os.getuid()}-{digest.hexdigest()[:16]}"
    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise RuntimeError(f"others can write to {folder}, from which code would be loaded. Remove it.")
    if module.exists():
        return module
    with tempfile.TemporaryDirectory() as scratch:

        def compile_one(source: Path) -> str:
            target = f"{scratch}/{source.name}.o"
            _run([compiler, *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources()))
        _run([compiler, "-shared", *objects, "-o", f"{scratch}/{module.name}"])
        # A move inside one file system is atomic, so that sessions side by side never load half a file.
        shutil.copy(f"{scratch}/{module.name}", staged := f"{module}.{os.getpid()}")
        os.replace(staged, module)
    return module


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def load() -> ModuleType:
    """The module; skips the test, with the reason, where it cannot be built for want of a compiler."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("the CUDA emulation needs a C++ compiler (g++, or CXX)")
    spec = importlib.util.spec_from_file_location("_cuda", build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def backend_on_cpu(module: ModuleType) -> Iterator[None]:
    """`backend="cuda"` takes CPU tensors and runs the emulated kernels."""
    patch = pytest.MonkeyPatch()
    patch.setattr(gpu, "_load_cuda", lambda: (module, ""))
    patch.setattr(gpu, "cuda_missing", lambda: "")
    patch.setattr(gpu, "device_too_old", lambda device: "")
    patch.setattr(backend, "_RESOLVED", {})
    patch.setattr(
        backend,
        "_SUPPORT",
        {op: {name: backend.Support(("cpu", "cuda"), support.dtypes) if name == "cuda" else support for name, support in row.items()} for op, row in backend._SUPPORT.items()},
    )
    try:
        yield
    finally:
        patch.undo()


@dataclass(frozen=True)
class Target:
    """A place to run an op: the emulated kernels on the CPU, or a backend on a GPU."""

    device: torch.device
    backend: str

    def require(self, op: str, dtype: torch.dtype = torch.float32) -> None:
        """Skip, with the reason, where this backend has no such kernel."""
        dummy = torch.empty(1, dtype=dtype, device=self.device)
        if found := backend.reasons(op, self.backend, dummy):
            pytest.skip("; ".join(found))
