"""Files of other runs and files that are no settings: refused in one sentence, before anything is written."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mwm.train import PretrainConfig, checkpoint, pretrain
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


def test_a_few_lines_that_stand_for_billions_are_refused(tmp_path: Path) -> None:
    """Aliases cost nothing until a sentence quotes the value: 10^12 texts in the refusal of `images`."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]", *(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 12)), "images: *a11"]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(TrainError, match="YAML of at most 5,000,000 values, got more"):
        PretrainConfig.from_yaml(tmp_path / "c.yaml", out="run")


@pytest.mark.parametrize("name", ["checkpoint.pt", "config.yaml"])
def test_a_run_whose_files_lack_something_is_refused_by_name(name: str, settings: dict[str, Any]) -> None:
    import yaml

    config = PretrainConfig(**{**settings, "epochs": 1, "panel_every": 0})
    run = pretrain(config)
    if name == "checkpoint.pt":
        state = checkpoint.load(run / name)
        del state["schedule"]
        checkpoint.save(run / name, state)
    else:
        stored = yaml.safe_load((run / name).read_text())
        del stored["resolved"]["policy"]
        (run / name).write_text(yaml.safe_dump(stored))
    with pytest.raises(TrainError, match=f"{name} lacks '{'schedule' if name == 'checkpoint.pt' else 'policy'}'"):
        pretrain(replace(config, resume=True))
