"""Measure the kernels on this machine.

  mwm bench             list the benches
  mwm bench encoder     the sparsified encoder against the dense one and against mask-multiply
  mwm bench NAME …      further words go to that bench; `mwm bench NAME --help` explains them
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bench's name, then its own options."""
    parser.add_argument("name", nargs="?", help="which bench; leave out to list them")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="…", help="options of that bench")


def run(options: argparse.Namespace, words: list[str]) -> int:
    """List the benches or run one."""
    found = benches()
    if options.name is None:
        print("benches:")
        for name in found:
            print(f"  mwm bench {name:16}{_summary(name)}")
        return 0
    if options.name not in found:
        raise ValueError(f"bench: NAME must be one of {', '.join(found) or 'none installed'}, got {options.name!r}.")
    importlib.import_module(f"mwm.bench.bench_{options.name}").main(options.rest)
    return 0


def benches() -> list[str]:
    """Names of the installed benches."""
    import mwm.bench

    return sorted(m.name.removeprefix("bench_") for m in pkgutil.iter_modules(mwm.bench.__path__) if m.name.startswith("bench_"))


def _summary(name: str) -> str:
    import ast
    from pathlib import Path

    import mwm.bench

    for folder in mwm.bench.__path__:
        file = Path(folder) / f"bench_{name}.py"
        if file.is_file():
            return (ast.get_docstring(ast.parse(file.read_text())) or "").splitlines()[0]
    return ""
