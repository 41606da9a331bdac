"""Measure the kernels on this machine: check that both sides agree, then time them in turn.

  mwm bench             list the benches
  mwm bench encoder     the sparsified encoder against the dense one and against mask-multiply
  mwm bench all --csv FILE --json FILE   everything, about twenty-five minutes; rows are written as they are measured
"""

from __future__ import annotations

import argparse
import ast
import importlib
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The bench's name and the options that all share."""
    from mwm.bench.settings import add_options

    parser.add_argument("name", nargs="?", metavar="NAME", help="which bench; leave out to list them")
    add_options(parser)


def run(options: argparse.Namespace, words: list[str]) -> int:
    """List the benches or run one."""
    from mwm.bench import suite

    if options.name is None:
        print("benches:")
        for name, modules in suite.BENCHES.items():
            print(f"  mwm bench {name:10}{_summary(modules[0])}")
        print(f"  mwm bench {'all':10}all of them")
        return 0
    return suite.run_options(options)


def _summary(module: str) -> str:
    """The first line of a bench, read without importing it (torch and timm take seconds)."""
    file = Path(str(importlib.import_module("mwm.bench.suite").__file__)).with_name(f"{module}.py")
    return (ast.get_docstring(ast.parse(file.read_text())) or "").splitlines()[0]
