"""The configuration: checked on creation, YAML with overrides, unknown names refused with the nearest."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from mwm.train import config as module
from mwm.train.config import PretrainConfig, TrainError


def _config(**changes) -> PretrainConfig:
    return PretrainConfig(**{"images": "scans", "out": "run", **changes})


def test_defaults_are_the_papers() -> None:
    config = _config()
    assert (config.image_size, config.patch_size, config.decoder_width, config.optimizer) == (224, 32, 768, "lamb")
    assert (config.base_lr, config.weight_decay, config.weight_decay_end, config.clip, config.min_std) == (2e-4, 0.04, 0.2, 5.0, 0.0)
    assert config.grid == (7, 7)


@pytest.mark.parametrize(("changes", "words"), [
    ({"patch_size": 30}, "patch_size must divide the image.*210 x 210"),
    ({"mask_ratio": 1.0}, r"mask_ratio must be a share in \[0, 1\)"),
    ({"mask_ratio": -0.1}, r"mask_ratio must be a share in \[0, 1\)"),
    ({"high": float("nan")}, "high must be a share"),
    ({"mask": "region"}, "mask must be uniform without regions"),
    ({"image_size": (224,)}, "image_size must be one number or"),
    ({"epochs": 0}, "epochs must be a positive whole number"),
    ({"batch_size": True}, "batch_size must be a positive whole number"),
    ({"warmup_epochs": 400}, "warmup_epochs must be in"),
    ({"crop_scale": (0.5, 0.2)}, "crop_scale must be two shares"),
    ({"precision": "int8"}, "precision must be fp32"),
    ({"resume": True, "overwrite": True}, "resume must be left out together with overwrite"),
    ({"regions": "r", "mask_ratio": 0.5, "low": 0.2}, "low must be left out together with mask_ratio"),
    ({"images": ""}, "images must be a folder"),
    ({"crop_scale": 0.5}, "crop_scale must be two shares"),
    ({"crop_scale": ("a", "b")}, "crop_scale must be two shares"),
    ({"flip": "no"}, "flip must be true or false, got 'no'"),
    ({"strict": 1}, "strict must be true or false"),
    ({"split": 1}, "split must be a text, got 1. Put it in quotes"),
    ({"regions": ["masks"]}, "regions must be a text"),
    ({"base_lr": float("inf")}, "base_lr must be a positive number"),
    ({"channels": 65}, "channels must be a whole number from 1 to 64"),
    ({"read": {"size": [64, 64]}}, "read must be settings besides the size.*Give image_size"),
    ({"high": 0.9}, "high must be left out with masks that are uniform, got 0.9. Add regions"),
    ({"regions": "r", "mask": "uniform", "low": 0.2}, "low must be left out with masks that are uniform"),
])
def test_a_wrong_value_is_one_sentence_that_names_the_field(changes: dict, words: str) -> None:
    with pytest.raises(TrainError, match=words) as caught:
        _config(**changes)
    assert "\n" not in str(caught.value)


def test_yaml_round_trip_with_overrides(tmp_path: Path) -> None:
    import yaml

    config = _config(image_size=(96, 64), crop_scale=(0.5, 1.0), prompt="both lungs", read={"intensity": "minmax"})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**config.to_dict(), "resolved": {"mean": [0.5]}}))
    assert PretrainConfig.from_yaml(path) == config
    assert PretrainConfig.from_yaml(path, epochs=7) == config.replace(epochs=7)
    assert PretrainConfig.from_run(tmp_path) == config.replace(out=str(tmp_path), resume=True)


def test_an_unknown_setting_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("images: scans\nout: run\nbach_size: 8\n")
    with pytest.raises(TrainError, match=r"'bach_size' is no setting.*Did you mean 'batch_size'"):
        PretrainConfig.from_yaml(path)
    with pytest.raises(TrainError, match=r"'epoch' is no setting.*'epochs'"):
        _config().replace(epoch=3)


@pytest.mark.parametrize(("text", "words"), [("- a\n- b\n", "must hold `name: value` lines"), ("a: [1\n", "must be YAML")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(TrainError, match=words):
        PretrainConfig.from_yaml(path)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(TrainError, match="the file must be readable"):
        PretrainConfig.from_yaml("absent.yaml")


def test_the_config_module_needs_only_the_standard_library() -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    names = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {(node.module or "").split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert names <= set(sys.stdlib_module_names)
