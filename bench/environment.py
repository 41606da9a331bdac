"""Where a figure was measured: versions, processor, threads, commit, date."""

from __future__ import annotations

import functools
import platform
import subprocess
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def environment() -> dict[str, str]:
    """What a reader needs to place a figure; every value is text."""
    return {"threads": str(torch.get_num_threads()), "date": time.strftime("%Y-%m-%d"), **_fixed()}


@functools.cache
def _fixed() -> dict[str, str]:
    return {"torch": torch.__version__, "python": platform.python_version(), "cpu": _cpu_name(), "isa": _isa(), "commit": _commit()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _isa() -> str:
    from mwm.ops import backend

    return backend.cpu_isa()


def _commit() -> str:
    """The commit of this checkout, "+" where sources differ from it; "unknown" for an installed package."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=False).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel") or "/").resolve() != HERE.parent:
            return "unknown"
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(HERE.parent / "csrc"), str(HERE.parent / "python"), str(HERE / "*.py"))
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except FileNotFoundError:
        return "unknown"
