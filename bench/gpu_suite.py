"""The benches of a GPU: each checks that the sides agree, then reads them in turn; rows are written as they are measured.

    python -m mwm.bench.gpu_suite NAME --csv FILE [--only TEXT] [--pairs N] [--hidden PERCENT …] [--smoke] [--device cpu]

NAME is one of masks, layers, depthwise, encoder, step, memory, or all. With `--device cpu --smoke` the same code runs without a GPU, on tiny
shapes. Columns are those of `mwm bench`; `cpu` and `isa` hold the GPU's name and compute capability.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import time
from collections.abc import Sequence

import torch
from mwm.bench.environment import environment
from mwm.bench.gpu_bars import bar_of
from mwm.bench.harness import Case, measure
from mwm.bench.rows import Row, Sink
from mwm.bench.settings import Settings, add_options, settings_of

NAMES = ("masks", "layers", "depthwise", "encoder", "step", "memory")


def collect(name: str, settings: Settings, device: str, only: str = "") -> list[Case]:
    """The cases of a bench, or of all, whose name contains `only`."""
    names = NAMES if name == "all" else (name,)
    found = [case for each in names for case in importlib.import_module(f"mwm.bench.gpu_{each}").cases(settings, device)]
    found = sorted((case for case in found if only in f"{case.bench} {case.name}"), key=lambda case: case.extra)
    if not found:
        raise ValueError(f"bench: --only must match a case of {name}, got {only!r}.")
    return found


def judged(row: Row, device: str) -> Row:
    """The row with the GPU's bar and name."""
    bar = bar_of(*row.key)
    row.bar, row.met = ("", "") if bar is None else (bar.words(), "met" if bar.met(row.score) else "missed")
    if device != "cpu":
        row.cpu = torch.cuda.get_device_name()
        row.isa = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return row


def run(cases: Sequence[Case], sink: Sink, device: str, pairs: int | None = None) -> tuple[list[Row], list[str]]:
    """Measure case after case. Returns the rows, and one sentence for each case that was refused or failed."""
    rows: list[Row] = []
    failures: list[str] = []
    for case in cases:
        try:
            found = [judged(row, device) for row in measure(case, pairs)]
        except Exception as error:  # one case that cannot run must not cost the others
            failures.append(f"{case.bench}: {case.name}: {type(error).__name__}: {error}")
            print(f"mwm: {failures[-1]}", file=sys.stderr, flush=True)
            continue
        finally:
            gc.collect()
            if device != "cpu":
                torch.cuda.empty_cache()
        for row in found:
            sink.add(row)
            print(row.line(), flush=True)
        rows += found
    return rows, failures


def main(argv: Sequence[str] | None = None) -> int:
    """Run one bench. Returns 0, or 1 where a case was refused or failed, or 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*NAMES, "all"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the benches, with --smoke")
    add_options(parser)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("mwm: bench: no CUDA device is visible. Try `--device cpu --smoke`, or `mwm bench` for the CPU.", file=sys.stderr)
        return 2
    if options.device == "cuda":
        torch.backends.cudnn.benchmark = True  # the rivals' best
    start = time.perf_counter()
    cases = collect(options.name, settings_of(options, compiled=True), options.device, options.only)
    print(", ".join(f"{key} {value}" for key, value in environment().items()), flush=True)
    rows, failures = run(cases, Sink(options.csv, options.json), options.device, options.pairs)
    met, missed = (sum(row.met == word for row in rows) for word in ("met", "missed"))
    print(f"{len(rows)} rows in {time.perf_counter() - start:.0f} s; of the rows with a bar {met} meet it, {missed} miss it"
          + (f"; {len(failures)} cases were refused or failed" if failures else "") + ".")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
