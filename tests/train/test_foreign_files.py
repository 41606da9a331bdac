"""Files of other runs and files that are no settings: refused in one sentence, before anything is written."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mwm.train import PretrainConfig, pretrain
from mwm.train.config import TrainError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # protobuf and tensorboard


def test_a_checkpoint_of_the_same_shapes_but_another_run_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    short = {**settings, "epochs": 1, "panel_every": 0, "crop_scale": (1.0, 1.0)}
    config = PretrainConfig(**short)
    pretrain(config)
    other = PretrainConfig(**{**short, "seed": 4, "out": str(tmp_path / "other")})
    pretrain(other)
    shutil.copy(Path(other.out) / "checkpoint.pt", Path(config.out) / "checkpoint.pt")
    with pytest.raises(TrainError, match=r"belongs to another run \(seed is 4 there and 3 in config.yaml\)"):
        pretrain(replace(config, resume=True))


@pytest.mark.parametrize(("content", "words"), [
    (b"\xff\xfe\x00\xa3", "no text"),
    (b"read: 3", "read must be a mapping"),
    (b"encoder: 4", "encoder must be a text, got 4"),
])
def test_a_file_that_holds_no_settings_is_refused_by_name(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(TrainError, match=words):
        PretrainConfig.from_yaml(tmp_path / "c.yaml", images="scans", out="run")


def test_yaml_numbers_with_an_exponent_and_no_point_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("base_lr: 1e-4\nweight_decay: 5E-2\nout: 1run\n")
    config = PretrainConfig.from_yaml(tmp_path / "c.yaml", images="scans")
    assert (config.base_lr, config.weight_decay, config.out) == (1e-4, 0.05, "1run")
