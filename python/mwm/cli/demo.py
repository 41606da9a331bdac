"""Run the whole pipeline on the scans that the package ships: prompt, regions, masks, sparse pre-training, probe.

Takes a few minutes on two cores and leaves OUT/report.html, pictures, and the run in OUT/run.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where, how long, which seed."""
    parser.add_argument("--out", metavar="FOLDER", default="demo", help="where everything goes (default: demo)")
    parser.add_argument("--train-seconds", type=float, metavar="X", default=150.0, help="time for pre-training; the epochs follow from it (default: 150)")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that it runs")
    parser.add_argument("--seed", type=int, metavar="N", default=0)


def run(options: argparse.Namespace, words: list[str]) -> int:
    """Run the demo."""
    from mwm.demo import DemoConfig, run_demo

    run_demo(DemoConfig(**vars(options)))
    return 0
