"""Runs inside an instrumented process of scripts/sanitize.sh: one known-bad kernel, or the op tests.

    python run.py SITE known-bad NAME
    python run.py SITE tests [PYTEST ARGUMENTS]

SITE holds the package with the instrumented core. It must come before any installed or editable copy, whose import hook would win.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType


def instrumented_core(site: str) -> ModuleType:
    """`mwm._core` of the folder, on its own thread pool; ends the process where another copy is found."""
    sys.path.insert(0, site)
    sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
    import torch

    from mwm import _core

    if not Path(_core.__file__).is_relative_to(site) or not hasattr(_core, "known_bad"):
        sys.exit(f"sanitize: {_core.__file__} is not the instrumented core of {site}.")
    # The OpenMP runtime is not instrumented: its own synchronisation would be invisible, and every loop a false race.
    _core.set_thread_runtime("pool")
    torch.set_num_threads(2)
    return _core


def known_bad(core: ModuleType, name: str) -> None:
    """Call one kernel that must end this process with a report."""
    import torch

    from mwm.ops import native

    dtype, value = (torch.int32, 2**31 - 1) if name in ("overflow_signed", "load_misaligned") else (torch.float32, 1)
    x, out = torch.full((1 << 16,), value, dtype=dtype), torch.zeros(64, dtype=dtype)
    for _ in range(20):  # the one thread may finish before the other wakes
        if not core.known_bad(name, native.view(x), native.view(out)):
            sys.exit(f"sanitize: there is no kernel {name!r}.")
    print(f"known-bad kernel {name} ran without a report")


def main(site: str, task: str, *rest: str) -> None:
    core = instrumented_core(site)
    if task == "known-bad":
        return known_bad(core, *rest)
    import pytest

    sys.exit(pytest.main(list(rest)))


if __name__ == "__main__":
    main(*sys.argv[1:])
