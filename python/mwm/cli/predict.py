"""Apply a trained model to images: class probabilities, masks or boxes, by the task it was trained for.

  mwm predict RUN/finetune IMAGES --out ANSWERS
  mwm predict RESULTS volume.nii.gz --out ANSWERS

RESULTS is a folder that mwm finetune wrote; it holds all that is needed. Research software: not for clinical use.
"""

from __future__ import annotations

import argparse

from mwm.cli.flags import add_fields


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per field of PredictConfig."""
    from mwm.transfer import PredictConfig

    add_fields(parser, PredictConfig, positional=("results", "images"))


def run(options: argparse.Namespace, words: list[str]) -> int:
    """Predict and say where the answers are."""
    from mwm.transfer import PredictConfig, predict

    print(f"answers in {predict(PredictConfig(**vars(options)))}")
    return 0
