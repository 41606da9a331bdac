"""torchvision's layers that look at a whole image: each agrees with the oracle."""

from __future__ import annotations

import torch
from comparison import compare, randomise, some_mask
from torch import nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead


def test_deeplab_head_pools_each_image_over_its_visible_positions() -> None:
    torch.manual_seed(0)
    head = DeepLabHead(8, 4, atrous_rates=(1, 2, 3))
    for module in head.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    result = compare(randomise(nn.Sequential(nn.Conv2d(2, 8, 4, stride=4), head)), some_mask(3, 3, 2), channels=2, patch=16)
    assert result.worst < 1e-8, result.where
