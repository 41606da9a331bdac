"""Versions, processor and threads, and which backend runs which op on this machine, with the reason where one does not."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
import textwrap
from pathlib import Path

import mwm

PACKAGES = ("torch", "torchvision", "timm", "triton", "transformers", "numpy", "pillow", "safetensors", "pydicom", "nibabel", "tifffile")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command takes no options."""


def run(options: argparse.Namespace, words: list[str]) -> int:
    """Print everything a bug report needs."""
    import torch

    from mwm.localize import list_localizers
    from mwm.masking import list_policies
    from mwm.ops import backend

    _section("mwm", [("version", mwm.__version__), ("folder", str(Path(mwm.__file__).parent)), ("python", f"{platform.python_version()} ({sys.executable})"),
                     ("system", platform.platform())])
    _section("packages", [(name, _version(name)) for name in PACKAGES])
    _section("processor", [("name", _cpu_name()), ("cores", f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} usable"),
                           ("torch threads", str(torch.get_num_threads())), *core_facts()])
    _section("gpu", _gpu(torch))
    rows = backend.table()
    names = [key for key in rows[0] if key != "op"] if rows else []
    print("ops")
    print(f"  {'':18}" + "".join(f"{name:12}" for name in names))
    gaps: dict[str, dict[str, list[str]]] = {name: {} for name in names}
    for row in rows:
        print(f"  {row['op']:18}" + "".join(f"{'yes' if row[name] == 'yes' else '–':12}" for name in names))
        for name in names:
            if row[name] != "yes":
                gaps[name].setdefault(row[name].replace(row["op"], "the op"), []).append(row["op"])
    for name, reasons in gaps.items():
        for reason, ops in reasons.items():
            which = "all ops" if len(ops) == len(rows) else ", ".join(ops)
            print(textwrap.fill(f"no {name} ({which}): {reason}", 110, initial_indent="  ", subsequent_indent="    "))
    print()
    _section("localizers", [("", ", ".join(list_localizers()))])
    _section("policies", [("", ", ".join(list_policies()))])
    return 0


def core_facts() -> list[tuple[str, str]]:
    """Instruction set and thread runtime of the native core, or why it is missing."""
    from mwm.ops import native

    core = native.core()
    if core is None:
        return [("native core", f"missing: {native.why_missing()}; {native.HOW_TO_BUILD}")]
    facts = []
    for label, names in (("instruction set", ("isa", "cpu_isa", "isa_name")), ("threads from", ("thread_runtime", "threads_runtime", "runtime")),
                         ("built with", ("compiler", "build_info"))):
        for name in names:
            value = getattr(core, name, None)
            if value is not None:
                facts.append((label, str(value() if callable(value) else value)))
                break
    return facts


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu(torch) -> list[tuple[str, str]]:
    from mwm.ops import gpu

    kernels = [("cuda kernels", gpu.cuda_missing() or "yes"), ("triton kernels", gpu.triton_missing() or "yes")]
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}, but no device is visible" if torch.version.cuda else "this torch has no CUDA"
        return [("none", built), *kernels]
    return [(f"cuda:{k}", torch.cuda.get_device_name(k)) for k in range(torch.cuda.device_count())] + kernels


def _section(title: str, rows: list[tuple[str, str]]) -> None:
    print(title)
    for name, value in rows:
        print(f"  {name:18}{value}" if name else f"  {value}")
    print()
