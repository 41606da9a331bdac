"""One way to measure for every bench: check first, then time the sides in turn, and quote medians of pairs.

The machines this runs on are shared and noisy, so a time alone means little: the sides are timed alternately in one process
and the ratio is taken pair by pair.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch


@dataclass
class Row:
    """One measured line: what ran, the medians in milliseconds, and rival time / our time."""

    bench: str
    case: str
    ours_ms: float
    rival: str
    rival_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int
    difference: float | None = None
    extra: dict[str, float | str] = field(default_factory=dict)


def environment() -> dict[str, str]:
    """What a reader needs to place a figure: versions, processor, threads, commit, date."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "isa": _isa(),
        "threads": str(torch.get_num_threads()),
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _isa() -> str:
    from mwm.ops import backend

    isa = getattr(backend, "cpu_isa", None)
    return isa() if callable(isa) else os.environ.get("MWM_CPU_ISA", "unknown")


def seconds(step: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(bench: str, case: str, ours: Callable[[], object], rivals: dict[str, Callable[[], object]], *, pairs: int = 9,
            warmup: int = 2, difference: dict[str, float] | None = None, **extra: float | str) -> list[Row]:
    """Time `ours` against each rival in turn, ours - rival - ours - rival …

    Args:
        ours, rivals: callables that do one whole step; correctness is checked by the caller before.
        pairs: number of interleaved pairs; the quoted ratio is the median over them, with the quartiles beside it.
        difference: measured relative difference of the results, by rival.

    Returns:
        one Row per rival.
    """
    for step in [ours, *rivals.values()]:
        for _ in range(warmup):
            step()
    mine: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(pairs):
        mine.append(seconds(ours))
        for name, rival in rivals.items():
            theirs[name].append(seconds(rival))
    rows = []
    for name, times in theirs.items():
        ratios = sorted(t / m for t, m in zip(times, mine, strict=True))
        rows.append(Row(bench, case, 1e3 * statistics.median(mine), name, 1e3 * statistics.median(times), statistics.median(ratios),
                        ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4], pairs, (difference or {}).get(name), dict(extra)))
    return rows


def relative_difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """‖ours − reference‖ / ‖reference‖ in float64."""
    reference = reference.double()
    return float((ours.double() - reference).norm() / reference.norm().clamp_min(1e-30))


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    lines = ["| case | ours ms | rival | rival ms | rival / ours | quartiles | difference |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        difference = "" if row.difference is None else f"{row.difference:.1e}"
        lines.append(f"| {row.case} | {row.ours_ms:.2f} | {row.rival} | {row.rival_ms:.2f} | **{row.ratio:.2f}** | "
                     f"{row.ratio_low:.2f}–{row.ratio_high:.2f} | {difference} |")
    return "\n".join(lines)


def write_json(rows: list[Row], path: str | Path) -> None:
    """Rows with the environment they were measured in."""
    Path(path).write_text(json.dumps({"environment": environment(), "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
