"""Pooled features come from the last map before the classifier, for timm and torchvision alike."""

from __future__ import annotations

import pytest
import torch

from mwm.train.export import full_model
from mwm.transfer.network import PooledFeatures, stage_of


@pytest.mark.parametrize(("name", "width"), [
    ("resnet10t", 512), ("convnext_atto", 320), ("efficientnet_lite0", 1280), ("torchvision/resnet18", 512), ("torchvision/mobilenet_v3_small", 576),
    ("torchvision/shufflenet_v2_x0_5", None),
])
def test_features_are_the_mean_of_the_last_map(name: str, width: int | None) -> None:
    model = full_model(name, 1, 3)
    if width is None:
        with pytest.raises(ValueError, match="Leave out --linear-probe"):
            PooledFeatures(model)
        return
    features = PooledFeatures(model).eval()
    with torch.no_grad():
        y = features(torch.rand(2, 1, 64, 96))
    assert y.shape == (2, width)


def test_stages_follow_the_parts_of_names() -> None:
    assert stage_of("layer3.0.conv1.weight") == "layer3"
    assert stage_of("stages.2.blocks.0.norm.weight") == "stages.2"
    assert stage_of("features.5.weight") == "features.5"
    assert stage_of("conv1.weight") == "conv1"
