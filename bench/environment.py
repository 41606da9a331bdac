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
    """The commit of the checkout, "+" where sources differ from it; "unknown" where there is none.

    An installed copy takes the commit of the checkout that it is run in, when that holds the same harness.
    """
    root = next((root for root in (HERE.parent, Path.cwd()) if (root / ".git").exists() and _same(root / "bench" / "harness.py")), None)
    if root is None:
        return "unknown"

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "csrc", "python", "bench/*.py")
        return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")
    except FileNotFoundError:
        return "unknown"


def _same(harness: Path) -> bool:
    return harness.is_file() and harness.read_bytes() == (HERE / "harness.py").read_bytes()
