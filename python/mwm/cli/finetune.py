"""Train a pre-trained encoder on labelled images for a task, or judge its frozen features.

  mwm finetune RUN DATA --task classify
  mwm finetune RUN DATA --task classify --linear-probe
  mwm finetune RUN DATA --task classify --label-fraction 0.1
  mwm finetune RUN DATA --task segment
  mwm finetune RUN DATA --task detect
  mwm finetune DATA --init scratch --encoder resnet50 --out RESULTS

DATA is a tree with one folder per class (or train/ val/ test/ with those inside), or an index CSV with the columns file, split, label, patient, mask, boxes.
Without RUN, --init says where the weights come from and --encoder which network they are for. mwm predict applies the results to other images.
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
    from mwm.train.heap import keep_freed_memory
    from mwm.transfer import FinetuneConfig, finetune

    given: dict[str, Any] = vars(options)
    if "data" not in given and "run" in given and ("encoder" in given or "init" in given):  # one place was filled, and RUN is not needed
        given["data"] = given.pop("run")
    keep_freed_memory()
    finetune(FinetuneConfig(**given), command=shlex.join(["mwm", *words]))
    return 0
