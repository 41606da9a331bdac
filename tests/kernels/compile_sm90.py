"""Compile every Triton kernel to sm_90 code without a GPU, and refuse register spills and too much shared memory.

    python tests/kernels/compile_sm90.py [--all] [BASENAME | FILE.py …]

A file in kernels/ lists what it launches in `compile_cases()`: (name, kernel, signature, constants, options). Pointers are taken as 16-byte
aligned, as torch allocates them. A file with a function `check_sizes` refuses on the host what 32 bits do not count. Runs in a process of its
own without TRITON_INTERPRET. Prints one line per case; the exit code is the number of bad ones. With --all also the cases that a file leaves
out by default (`compile_cases(every=True)`): every shipped config in every dtype, minutes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MAX_SHARED = 227 * 1024
SM = 90


def compile_case(kernel: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, Any], checked: bool = False) -> tuple[str, str]:
    """Compile one case; `checked`: the host refuses sizes beyond 32 bits. Returns (what it uses, why it is bad or "")."""
    import triton
    from triton.backends.compiler import GPUTarget

    missing = set(kernel.arg_names) ^ (set(signature) | set(constants))
    if missing:
        return "", f"the arguments {sorted(missing)} are not in the case, or not in the kernel"
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if types[name].startswith("*")}
    source = triton.compiler.ASTSource(kernel, signature=types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", SM, 32), options=options)
    used, spilled = registers(compiled.asm["ptx"])
    shared = compiled.metadata.shared
    bad = [f"{spilled} bytes of registers spilled"] if spilled else []
    bad += [f"{shared} bytes of shared memory, sm_{SM} has {MAX_SHARED}"] if shared > MAX_SHARED else []
    bad += narrow_offsets(compiled.asm["ttir"], checked)
    return f"{used} registers, {shared} bytes shared", "; ".join(bad)


@functools.cache
def registers(ptx: str) -> tuple[int, int]:
    """(registers per thread, bytes spilled) by ptxas -v."""
    from triton import knobs

    arch = re.search(r"\.target (sm_\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        done = subprocess.run([knobs.nvidia.ptxas.path, "-v", f"--gpu-name={arch}", str(path), "-o", str(path.with_suffix(".cubin"))],
                              capture_output=True, text=True, check=True)
    log = done.stdout + done.stderr
    return int(re.search(r"Used (\d+) registers", log).group(1)), sum(map(int, re.findall(r"(\d+) bytes spill", log)))


def narrow_offsets(ttir: str, checked: bool) -> list[str]:
    """Products of two variables in 32 bits that become an offset, widened afterwards or (where nobody checks) as they are: they wrap beyond 2^31 elements."""
    lines = dict(re.findall(r"(%[\w#:]+) = ([^\n]*)", ttir))
    constants = {name for name, line in lines.items() if line.startswith("arith.constant")}
    found, seen = [], set()

    def follow(name: str) -> None:
        line = lines.get(name, "")
        if name in seen or not re.search(r"(xi32>|: i32)( loc.*)?$", line):
            return
        seen.add(name)
        operands = re.findall(r"%[\w#:]+", line)
        if line.startswith("arith.muli") and not constants & set(operands):
            found.append(f"a 32-bit product becomes an offset: {name} = {line}")
        if re.match(r"arith\.(muli|addi|subi)|tt\.(splat|broadcast|expand_dims)", line):
            for operand in operands:
                follow(operand)

    for line in lines.values():
        if line.startswith("arith.extsi"):
            product = re.search(r"%[\w#:]+", line).group()
            if lines.get(product, "").startswith("arith.muli"):
                follow(product)
        if line.startswith("tt.addptr") and not checked and "!tt.ptr<i32>" not in line:  # tables of int32 have an entry per patch or tile: fewer than 2^31
            follow(re.findall(r"%[\w#:]+", line)[1])
    return found


def with_ones(cases: list[tuple]) -> list[tuple]:
    """Each kernel once more with all integers 1: Triton makes such an argument a constant, which has no methods of a tensor."""
    last = {kernel.__name__: case for case in cases for kernel in [case[1]]}
    found = []
    for name, kernel, signature, constants, options in last.values():
        ones = {p.name: 1 for p in kernel.params if signature.get(p.name) == "i32" and not p.do_not_specialize}
        if ones:
            found.append((f"{name}, ones", kernel, {k: v for k, v in signature.items() if k not in ones}, {**constants, **ones}, options))
    return found


def _module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        return importlib.import_module(f"mwm.kernels.{name}")
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(words: list[str]) -> int:
    """Compile all cases of these files of kernels/, or of all, on all cores."""
    import triton

    every, basenames = "--all" in words, [word for word in words if word != "--all"]
    names = basenames or sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
    print(f"triton {triton.__version__}, sm_{SM}", flush=True)
    for basename in names:
        module = _module(basename)
        list_cases = getattr(module, "compile_cases", tuple)
        cases = list(list_cases(every=True) if every and "every" in inspect.signature(list_cases).parameters else list_cases())
        _CASES.extend((basename, hasattr(module, "check_sizes"), *case) for case in [*cases, *with_ones(cases)])
    failures = 0
    # Kernels cannot be pickled, so the workers are forked and take numbers.
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        for bad, line in pool.imap(_report, range(len(_CASES))):
            failures += bad
            print(line, flush=True)
    return failures


_CASES: list[tuple] = []


def _report(number: int) -> tuple[bool, str]:
    basename, checked, name, kernel, signature, constants, options = _CASES[number]
    start = time.perf_counter()
    try:
        used, bad = compile_case(kernel, signature, constants, options, checked)
    except Exception as error:  # every kind of compiler error counts, and the others are still to be seen
        while error.__cause__ is not None:  # the innermost names the line in the callee
            error = error.__cause__
        used, bad = "", f"{type(error).__name__}: {' … '.join(str(error).strip().splitlines()[-3:])}"
    return bool(bad), f"{'BAD' if bad else 'ok '} {basename}: {name}: {used} {bad} ({time.perf_counter() - start:.1f} s)"


if __name__ == "__main__":
    if os.environ.pop("TRITON_INTERPRET", None):
        os.execv(sys.executable, [sys.executable, *sys.argv])
    sys.exit(min(main(sys.argv[1:]), 100))
