"""A run with decode="hidden": recorded, continued with its own setting, and of the same files as a dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from mwm.train import PretrainConfig, pretrain
from mwm.train.config import TrainError
from mwm.train.logs import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # protobuf and tensorboard


def test_a_run_that_decodes_hidden_patches_learns_is_recorded_and_keeps_its_setting(settings: dict[str, Any]) -> None:
    runs = {mode: Path(pretrain(PretrainConfig(**{**settings, "decode": mode, "out": f"{settings['out']}_{mode}"}))) for mode in ("dense", "hidden")}
    losses = {mode: read_metrics(run / "metrics.csv")["loss"] for mode, run in runs.items()}
    assert losses["hidden"] != losses["dense"] and sum(losses["hidden"][-3:]) < sum(losses["hidden"][:3])
    assert yaml.safe_load((runs["hidden"] / "config.yaml").read_text())["decode"] == "hidden"
    shapes = {mode: {key: value.shape for key, value in load_file(run / "encoder.safetensors").items()} for mode, run in runs.items()}
    assert shapes["hidden"] == shapes["dense"]
    with pytest.raises(TrainError, match="decode is 'hidden' in the run and 'dense' now"):
        pretrain(PretrainConfig(**{**settings, "out": str(runs["hidden"]), "decode": "dense", "resume": True}))


def test_an_unknown_decode_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(TrainError, match=r"decode must be dense \| hidden, got 'tiles'"):
        PretrainConfig(**{**settings, "decode": "tiles"})
