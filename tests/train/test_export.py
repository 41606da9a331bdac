"""The exported encoder is read by timm, torchvision and load_encoder, and computes what was trained."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision.models._utils import IntermediateLayerGetter

from mwm.train.config import TrainError
from mwm.train.export import Preprocessing, export, full_model, load_encoder, name_map

PREPROCESSING = Preprocessing((64, 96), 2, (0.4, 0.5), (0.2, 0.3), {"intensity": "minmax"})


def _randomised(net: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return net


def _timm_pyramid(name: str) -> torch.nn.Module:
    return _randomised(timm.create_model(name, features_only=True, in_chans=2))


@pytest.mark.parametrize(("name", "head"), [
    ("resnet18", {"fc.weight", "fc.bias"}),
    ("convnext_atto", {"head.fc.weight", "head.fc.bias"}),
    ("densenet121", {"classifier.weight", "classifier.bias"}),
    ("efficientnet_b0", {"classifier.weight", "classifier.bias"}),
])
def test_timm_loads_the_run_folder_and_misses_only_the_head(name: str, head: set[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pyramid = _timm_pyramid(name)
    export(tmp_path, name, pyramid, PREPROCESSING, seed=0)
    model = timm.create_model(f"local-dir:{tmp_path}", num_classes=3)
    result = model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert set(result.missing_keys) == head
    assert result.unexpected_keys == []
    with caplog.at_level(logging.INFO, logger="timm"):
        loaded = timm.create_model(f"local-dir:{tmp_path}", num_classes=3, pretrained=True)
    text = " ".join(record.getMessage() for record in caplog.records)
    assert all(key in text for key in head) and "Unexpected" not in text
    images = torch.randn(1, 2, 64, 96)
    with torch.no_grad():
        ours = loaded.eval().forward_intermediates(images, intermediates_only=True)[-1]
        theirs = pyramid.eval()(images)[-1]
    assert torch.equal(ours, theirs)
    assert loaded(images).shape == (1, 3)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True).num_classes == 0  # strict: nothing is missing
    assert loaded.pretrained_cfg["mean"] == [0.4, 0.5] and loaded.pretrained_cfg["input_size"] == (2, 64, 96)


def test_torchvision_loads_the_encoder_and_misses_only_the_head(tmp_path: Path) -> None:
    full = _randomised(full_model("torchvision/resnet18", 3, 7))
    pyramid = IntermediateLayerGetter(full, {f"layer{i}": str(i) for i in range(1, 5)})
    export(tmp_path, "torchvision/resnet18", pyramid, Preprocessing((64, 64), 3, (0.5,) * 3, (0.2,) * 3), seed=0)
    model = torchvision.models.resnet18(num_classes=3)
    result = model.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=False)
    assert set(result.missing_keys) == {"fc.weight", "fc.bias"}
    assert result.unexpected_keys == []
    assert torch.equal(model.layer4[1].conv2.weight, full.layer4[1].conv2.weight)
    assert not (tmp_path / "config.json").exists()


def test_torchvision_stem_takes_any_number_of_channels() -> None:
    model = full_model("torchvision/resnet18", 1, 4)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 4)


def test_load_encoder_gives_the_full_model_its_head_and_its_preprocessing(tmp_path: Path) -> None:
    pyramid = _timm_pyramid("efficientnet_b0")
    export(tmp_path, "efficientnet_b0", pyramid, PREPROCESSING, seed=0, facts={"steps": "12"})
    encoder = load_encoder(tmp_path, num_classes=5)
    assert encoder.head == ("classifier.weight", "classifier.bias")
    assert encoder.preprocessing == PREPROCESSING
    assert {key.split(".")[0] for key in encoder.untrained} == {"conv_head", "bn2"}
    assert torch.equal(encoder.model.conv_stem.weight, pyramid.conv_stem.weight)
    assert encoder.model(torch.randn(1, 2, 64, 64)).shape == (1, 5)
    with safe_open(tmp_path / "encoder.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["encoder"] == "efficientnet_b0" and metadata["channels"] == "2" and metadata["mwm_version"] and metadata["steps"] == "12"
    assert json.loads(metadata["preprocessing"])["mean"] == [0.4, 0.5]


def test_normalise_uses_mean_and_deviation_per_channel() -> None:
    images = torch.rand(3, 2, 4, 4)
    torch.testing.assert_close(PREPROCESSING.normalise(images)[:, 1], (images[:, 1] - 0.5) / 0.3)


def test_a_foreign_pyramid_is_refused_before_it_is_trained() -> None:
    with pytest.raises(TrainError, match="has no counterpart in the full model"):
        name_map(timm.create_model("resnet18", features_only=True), full_model("resnet50", 3, 1))


@pytest.mark.parametrize(("name", "words"), [("resnet_18", "no model of timm"), ("torchvision/resnet19", "no classification model of torchvision"),
                                              ("torchvision/fcn_resnet50", "no classification model of torchvision")])  # would fetch its backbone's weights
def test_an_unknown_encoder_is_refused(name: str, words: str) -> None:
    with pytest.raises(TrainError, match=words):
        full_model(name, 3, 1)


def test_a_folder_without_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="must be an encoder written by mwm pretrain"):
        load_encoder(tmp_path)
