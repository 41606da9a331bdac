"""Runs inside an instrumented process of scripts/sanitize.sh: one known-bad kernel, or the op tests.

    python run.py SITE known-bad NAME
    python run.py SITE tests [PYTEST ARGUMENTS]

SITE holds the package with the instrumented core. It must come before any installed or editable copy, whose import hook would win.
"""

from __future__ import annotations

import sys
from pathlib import Path

site, task, *rest = sys.argv[1:]
sys.path.insert(0, site)
sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]

import torch

from mwm import _core
from mwm.ops import native

if not Path(_core.__file__).is_relative_to(site) or not hasattr(_core, "known_bad"):
    sys.exit(f"sanitize: {_core.__file__} is not the instrumented core of {site}.")
# The OpenMP runtime is not instrumented: its own synchronisation would be invisible, and every loop a false race.
_core.set_thread_runtime("pool")
torch.set_num_threads(2)


def known_bad(name: str) -> None:
    """Call one kernel that must end this process with a report."""
    floats, integers = torch.ones(1 << 16), torch.full((64,), 2**31 - 1, dtype=torch.int32)
    x, out = (integers, torch.zeros(64, dtype=torch.int32)) if name in ("overflow_signed", "load_misaligned") else (floats, torch.zeros(64))
    for _ in range(20):  # the one thread may finish before the other wakes
        if not _core.known_bad(name, native.view(x), native.view(out)):
            sys.exit(f"sanitize: there is no kernel {name!r}.")
    print(f"known-bad kernel {name} ran without a report")


if task == "known-bad":
    known_bad(*rest)
else:
    import pytest

    sys.exit(pytest.main(rest))
