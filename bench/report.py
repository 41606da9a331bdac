"""From the measured rows to `bench/RESULTS.md` and its pictures, and to `bench/RESULTS_GPU.md`.

    python -m mwm.bench.report [--csv bench/results/cpu.csv] [--out bench/RESULTS.md]
    python -m mwm.bench.report --csv bench/results/gpu.csv --out bench/RESULTS_GPU.md
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mwm.bench import plots
from mwm.bench.bars import BARS, Bar
from mwm.bench.gpu_bars import BARS as GPU_BARS
from mwm.bench.rows import Row, read_csv, score_words

HERE = Path(__file__).resolve().parent

TITLES = {
    "encoder": "Encoder, forward + backward",
    "step": "Whole pre-training step",
    "sampler": "Masks",
    "coverage": "Region coverage",
    "plan": "Plan and pack",
    "memory": "Peak memory of the encoder step",
    "threads": "One thread and two",
    "layers": "Single layers",
}
GPU_TITLES = {
    "gpu encoder": "Encoder, forward + backward, bfloat16",
    "gpu step": "Whole pre-training step",
    "gpu memory": "Peak memory of the encoder step",
    "gpu masks": "Masks, plans, packing",
    "gpu depthwise": "Depthwise convolutions",
    "gpu layers": "Single layers",
}


@dataclass(frozen=True)
class Page:
    """What differs between the pages: title, rows' file, what measured them, bars, titles of benches."""

    title: str
    csv: str
    made: str
    bars: Sequence[Bar]
    titles: dict[str, str]


CPU_PAGE = Page("Measured on the CPU", "results/cpu.csv", "`mwm bench all --csv bench/results/cpu.csv`", BARS, TITLES)
GPU_PAGE = Page("Measured on a GPU", "results/gpu.csv", "`bench/on_gpu.sh` and `python -m mwm.bench.gpu_suite`", GPU_BARS, GPU_TITLES)
ENVIRONMENT = ("cpu", "isa", "threads", "torch", "python", "commit", "date")


def report(rows: Sequence[Row], pictures: dict[str, str]) -> str:
    """The Markdown text.

    Args:
        rows: as `read_csv` gives them.
        pictures: "cost", "layers", "memory" -> address of the picture; left out where there is none.
    """
    rows = [row for row in rows if not row.case.startswith("smoke")]
    page = GPU_PAGE if rows and rows[0].bench in GPU_TITLES else CPU_PAGE
    lost = [row for row in rows if row.score_is == "rival / ours" and row.score < 1]
    text = [f"# {page.title}", "",
            f"Written by `python -m mwm.bench.report` from [the rows]({page.csv}) that {page.made} measured; do not edit.",
            "Before anything is timed, both sides are run and their results compared; the sides then run in turn in one process, and the median of the "
            "pairs' ratios is quoted, with quartiles. Times are medians.", ""]
    if page is GPU_PAGE:
        text += ['"graph" is the time of the kernels alone, a CUDA graph replayed; "eager" has the launches from Python. Weights are float32 under autocast in '
                 "the encoder rows, as in training, and bfloat16 in those of single layers.", ""]
    text += [*_environment(rows), "", "## Bars", "", *_bars(rows, page.bars), ""]
    missed = [bar for bar in page.bars if (worst := _worst(bar, rows)) is not None and not bar.met(worst.score)]
    text += [f"Missed: {'; '.join(bar.text for bar in missed) if missed else 'none of the measured ones'}.", ""]
    text += ["## Where it loses", ""]
    text += [*_table(lost, verdict=False), ""] if lost else ["No row is slower than its rival.", ""]
    for bench, title in page.titles.items():
        found = [row for row in rows if row.bench == bench]
        if not found:
            continue
        text += [f"## {title}", ""]
        for name, owner in (("cost", "encoder"), ("layers", "layers"), ("memory", "memory")):
            if owner == bench and name in pictures:
                text += [f"![{title}]({pictures[name]})", ""]
        if bench == "sampler":
            text += ["Masks start from regions on the patch grid; bringing regions from pixels to the grid costs what the next table says.", ""]
        if bench == "layers":
            text += ["The limit of a convolution is the rate of oneDNN's own, for the products of visible inputs with visible outputs as the direct sum has them. "
                     "Winograd's minimal filtering takes up to 2.25 times fewer in 3x3 convolutions, which therefore can come to more than 100 %. "
                     "The limit of the others is memory bandwidth.", ""]
        text += [*(_layers(found) if bench == "layers" else _table(found)), ""]
    return "\n".join(text).rstrip() + "\n"


def _environment(rows: Sequence[Row]) -> list[str]:
    lines = []
    for values in dict.fromkeys(tuple(getattr(row, name) for name in ENVIRONMENT) for row in rows):
        of = dict(zip(ENVIRONMENT, values, strict=True))
        lines.append(f"* {of['cpu']}, {of['isa']}, {of['threads']} threads, torch {of['torch']}, Python {of['python']}, commit {of['commit']}, {of['date']}")
    return lines or ["Nothing was measured."]


def _worst(bar: Bar, rows: Sequence[Row]) -> Row | None:
    found = [row for row in rows if bar.covers(*row.key)]
    return (min if bar.sign == ">=" else max)(found, key=lambda row: row.score) if found else None


def _bars(rows: Sequence[Row], bars: Sequence[Bar]) -> list[str]:
    lines = ["| work | bar | measured | quartiles | |", "|---|---|---|---|---|"]
    for bar in bars:
        worst = _worst(bar, rows)
        goal = bar.words() + (f", aim {bar.aim}" if bar.aim else "")
        if worst is None:
            lines.append(f"| {bar.text} | {goal} | | | not measured |")
            continue
        found = [row for row in rows if bar.covers(*row.key)]
        which = f", the worst of {len(found)}: {worst.case}" if len(found) > 1 else ""
        below = sum(not bar.met(row.score) for row in found)
        verdict = "met" if not below else "**missed**" + (f" by {below}" if len(found) > 1 else "")
        lines.append(f"| {bar.text} | {goal} | **{score_words(worst.score, worst.score_is)}**{which} | {worst.low:.3g}–{worst.high:.3g} | {verdict} |")
    return lines


def _table(rows: Sequence[Row], *, verdict: bool = True) -> list[str]:
    lines = ["| case | ours | rival | | score | quartiles | difference | |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        words = "; ".join(filter(None, [f"bar {row.bar} {_mark(row)}" if verdict and row.bar else "", _slower(row) if verdict else "", row.note]))
        lines.append(f"| {row.case} | {row.ours:.4g} {row.unit} | {row.rival} | {row.theirs:.4g} {row.unit} | **{score_words(row.score, row.score_is)}** | "
                     f"{row.low:.3g}–{row.high:.3g} | {row.difference:.1e} | {words} |")
    return lines


def _layers(rows: Sequence[Row]) -> list[str]:
    lines = ["| layer | ours ms | dense ms | dense / ours | quartiles | of the limit | limit | |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        percent = "" if row.limit_percent is None else f"{row.limit_percent:.0f} %"
        score = score_words(row.score, row.score_is).removesuffix(" ×")
        lines.append(f"| {row.case} | {row.ours:.3f} | {row.theirs:.3f} | **{score}** | {row.low:.2f}–{row.high:.2f} | {percent} | "
                     f"{row.limit.split(' (')[0]} | {_slower(row)} |")
    return lines


def _mark(row: Row) -> str:
    return "**missed**" if row.met == "missed" else row.met


def _slower(row: Row) -> str:
    return "**slower**" if row.score_is == "rival / ours" and row.score < 1 else ""


def write(csv_path: Path, out: Path) -> None:
    """Read the rows, draw the pictures beside them, write the page."""
    rows = [row for row in read_csv(csv_path) if not row.case.startswith("smoke")]
    pictures = {}
    for name, chart in (("cost", plots.cost_chart(rows)), ("layers", plots.layers_chart(rows)), ("memory", plots.memory_chart(rows))):
        if chart is not None:
            path = csv_path.parent / f"{csv_path.stem}_{name}.png"
            plots.save(chart, path)
            pictures[name] = os.path.relpath(path, out.parent)
    out.write_text(report(rows, pictures), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "cpu.csv")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    options = parser.parse_args(argv)
    write(options.csv, options.out)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
