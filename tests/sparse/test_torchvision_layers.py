"""torchvision's layers that look at a whole image: each agrees with the oracle."""

from __future__ import annotations

import collections

import pytest
import torch
import torchvision
from comparison import compare, randomise, some_mask
from torch import nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

import mwm


def test_deeplab_head_pools_each_image_over_its_visible_positions() -> None:
    torch.manual_seed(0)
    head = DeepLabHead(8, 4, atrous_rates=(1, 2, 3))
    for module in head.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    result = compare(randomise(nn.Sequential(nn.Conv2d(2, 8, 4, stride=4), head)), some_mask(3, 3, 2), channels=2, patch=16)
    assert result.worst < 1e-8, result.where


def test_an_unpadded_stem_is_refused_with_the_name_of_its_layer_since_its_map_shifts_against_the_patches() -> None:
    net = mwm.sparsify(torchvision.models.squeezenet1_1(num_classes=2))
    with pytest.raises(ValueError, match=r"tile_conv in module 'features.0' \(Conv2d\): the output must be the input divided by the stride"):
        net(mwm.pack(torch.zeros(1, 3, 64, 64), torch.ones(1, 2, 2, dtype=torch.bool)))


def test_maps_of_different_strides_are_refused_with_the_name_of_the_module_that_adds_them() -> None:
    class Adds(nn.Module):
        def forward(self, x):
            return x + nn.functional.avg_pool2d(x, 2)

    with pytest.raises(ValueError, match=r"different strides cannot be combined in module 'add' \(Adds\)"):
        mwm.sparsify(nn.Sequential(collections.OrderedDict(add=Adds())))(mwm.pack(torch.zeros(1, 3, 64, 64), torch.ones(1, 2, 2, dtype=torch.bool)))
