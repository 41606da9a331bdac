"""The suite: which benches there are, and how one or all of them are run.

    python -m mwm.bench.suite encoder --csv FILE        the same as `mwm bench encoder --csv FILE`
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Sequence

from mwm.bench.rows import Row, Sink
from mwm.bench.settings import Settings, add_options, settings_of

BENCHES: dict[str, tuple[str, ...]] = {
    "sampler": ("bench_sample_active", "bench_region_coverage"),
    "coverage": ("bench_region_coverage",),
    "plan": ("bench_plan",),
    "layers": ("bench_layers",),
    "encoder": ("bench_encoder",),
    "step": ("bench_step",),
    "memory": ("bench_memory",),
    "threads": ("bench_threads",),
    "localize": ("bench_localize",),
}
"""Names for users, and the modules behind each. The sampler is never shown without the coverage it starts from."""

ALL = tuple(dict.fromkeys(module for modules in BENCHES.values() for module in modules))


def modules_of(name: str) -> tuple[str, ...]:
    """The modules behind a name.

    Raises:
        ValueError: there is no such bench.
    """
    if name == "all":
        return ALL
    if name not in BENCHES:
        raise ValueError(f"bench: NAME must be one of {', '.join(BENCHES)} or all, got {name!r}.")
    return BENCHES[name]


def collect(name: str, settings: Settings, only: str = "", part: str | None = None) -> list:
    """The cases of a bench, or of all, whose name contains `only`; `part` "bars" or "rest": those that a bar judges, or the others."""
    found = [case for module in modules_of(name) for case in importlib.import_module(f"mwm.bench.{module}").cases(settings)]
    if only:
        # The coverage belongs to the sampler's figures, whatever was asked for.
        found = [case for case in found if only in f"{case.bench} {case.name}" or (name == "sampler" and case.bench == "coverage")]
    found = sorted((case for case in found if part is None or case.extra == (part == "rest")), key=lambda case: case.extra)
    if not found:
        raise ValueError(f"bench: --only and --part must match a case of {name}, got {only!r}, {part}.")
    return found


def run(cases: Sequence, sink: Sink, *, pairs: int | None = None, say: Callable[[str], None] = print) -> tuple[list[Row], list[str]]:
    """Measure case after case; each row is written and printed when it is there.

    Returns:
        The rows, and one sentence for each case that was refused or failed.
    """
    from mwm.bench.harness import measure

    rows: list[Row] = []
    failures: list[str] = []
    for case in cases:
        try:
            found = measure(case, pairs)
        except Exception as error:  # one case that cannot run must not cost the others
            failures.append(f"{case.bench}: {case.name}: {type(error).__name__}: {error}")
            print(f"mwm: {failures[-1]}", file=sys.stderr, flush=True)
            continue
        for row in found:
            sink.add(row)
            say(row.line())
        rows += found
    return rows, failures


def main(argv: Sequence[str] | None = None) -> int:
    """Run one bench or all; the exit code is 1 where a case was refused or failed."""
    parser = argparse.ArgumentParser(prog="mwm bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("name", choices=[*BENCHES, "all"])
    add_options(parser)
    options = parser.parse_args(argv)
    return run_options(options)


def run_options(options: argparse.Namespace) -> int:
    """Run what parsed options ask for."""
    import torch
    from mwm.bench.environment import environment

    modules_of(options.name)
    sink = Sink(options.csv, options.json)
    if options.threads:
        torch.set_num_threads(options.threads)
    start = time.perf_counter()
    cases = collect(options.name, settings_of(options, compiled=options.name == "all"), options.only, options.part)
    print(", ".join(f"{key} {value}" for key, value in environment().items()), flush=True)
    rows, failures = run(cases, sink, pairs=options.pairs, say=lambda text: print(text, flush=True))
    missed = sum(row.met == "missed" for row in rows)
    print(f"{len(rows)} rows in {time.perf_counter() - start:.0f} s; of the rows with a bar {sum(row.met == 'met' for row in rows)} meet it, {missed} miss it"
          + (f"; {len(failures)} cases were refused or failed" if failures else "") + ".")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
