"""Train a pre-trained encoder on labelled images, or probe it with a linear classifier on frozen features.

  mwm finetune RUN DATA --task classify
  mwm finetune RUN DATA --task classify --linear-probe

DATA is a tree with one folder per class (or train/ val/ test/ with those inside), or an index CSV with the columns file, split, label, patient.
"""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from mwm.cli.flags import add_fields


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per field of FinetuneConfig."""
    from mwm.transfer import FinetuneConfig

    add_fields(parser, FinetuneConfig, positional=("run", "data"))


def run(options: argparse.Namespace, words: list[str]) -> int:
    """Train and print the figures."""
    from mwm.transfer import FinetuneConfig, finetune

    given: dict[str, Any] = vars(options)
    finetune(FinetuneConfig(**given), command=shlex.join(["mwm", *words]))
    return 0
