"""timm's norms, attention modules and downsampling layers one by one: each agrees with the oracle or is refused by name."""

from __future__ import annotations

import pytest
import timm
import timm.layers as layers
import torch
import torchvision
from comparison import compare, randomise, some_mask
from timm.layers.grn import GlobalResponseNorm
from torch import nn

import mwm

NORMS = ["BatchNormAct2d", "GroupNorm", "GroupNorm1", "GroupNormAct", "GroupNorm1Act", "LayerNorm2d", "LayerNormAct2d", "RmsNorm2d", "SimpleNorm2d", "FilterResponseNormTlu2d",
         "FilterResponseNormAct2d", "FrozenBatchNormAct2d", "EvoNorm2dB0", "EvoNorm2dS0", "EvoNorm2dS0a", "EvoNorm2dS1", "EvoNorm2dS2", "EvoNorm2dB1", "EvoNorm2dB2"]
ATTENTION = ["se", "ese", "eca", "ecam", "ceca", "ge", "gc", "gca", "cbam", "lcbam", "splat", "sk", "nl", "bat", "coord", "simam"]
AGREE = {
    "BatchNormAct2d", "GroupNorm", "GroupNorm1", "GroupNormAct", "GroupNorm1Act", "LayerNorm2d", "LayerNormAct2d", "RmsNorm2d", "SimpleNorm2d",
    "FilterResponseNormTlu2d", "FilterResponseNormAct2d", "FrozenBatchNormAct2d", "EvoNorm2dS0", "EvoNorm2dS0a", "EvoNorm2dS1", "EvoNorm2dS2", "se", "ese",
    "eca", "ecam", "ceca", "ge", "cbam", "splat", "sk", "blur", "aa", "std", "scaled", "same", "maxsame", "avgsame", "space", "grn", "mixed", "cond", "cond4",
}


def agrees_or_is_refused(name: str, layer: nn.Module, patch: int = 8) -> None:
    net = randomise(nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), layer, nn.Conv2d(16 if name != "space" else 256, 4, 3, padding=1)))
    try:
        result = compare(net, some_mask(3, 3, 2), channels=2, patch=patch)
    except (mwm.sparse.PackedError, ValueError) as error:
        assert "module" in str(error), error
        assert name not in AGREE, error
        return
    assert result.worst < 1e-6, result.where  # some of timm's norms compute in float32 whatever the input


class Routed(nn.Module):
    """A CondConv2d with its routing, as efficientnet_cc has it."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.routing = conv, nn.Linear(16, conv.num_experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x, torch.sigmoid(self.routing(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))))


@pytest.mark.parametrize("name", NORMS)
def test_norm(name: str) -> None:
    if not hasattr(layers, name):
        pytest.skip(f"this timm has no {name}")
    kind = getattr(layers, name)
    in_groups = name in ("GroupNorm", "GroupNormAct")
    agrees_or_is_refused(name, kind(16, 4) if in_groups else kind(16, groups=4) if "2dS" in name else kind(16))


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    try:
        layer = layers.create_attn(name, 16)
    except (AssertionError, TypeError) as error:
        pytest.skip(f"this timm does not make {name}: {error}")
    agrees_or_is_refused(name, layer)


@pytest.mark.parametrize("name", ["blur", "std", "scaled", "same", "maxsame", "avgsame", "space", "grn", "mixed", "dropblock", "cond", "cond4"])
def test_layer(name: str) -> None:
    made = {
        "blur": lambda: layers.BlurPool2d(16),
        "std": lambda: layers.StdConv2dSame(16, 16, 3, stride=2),
        "scaled": lambda: layers.ScaledStdConv2dSame(16, 16, 3, stride=2),
        "same": lambda: layers.create_conv2d(16, 16, 5, stride=2, padding="same"),
        "maxsame": lambda: layers.create_pool2d("max", 3, 2, padding="same"),
        "avgsame": lambda: layers.create_pool2d("avg", 3, 2, padding="same"),
        "space": lambda: layers.SpaceToDepth(4),
        "grn": lambda: GlobalResponseNorm(16, channels_last=False),
        "mixed": lambda: layers.MixedConv2d(16, 16, [3, 5, 7], depthwise=True),
        "dropblock": lambda: layers.DropBlock2d(0.5),
        "cond": lambda: Routed(layers.CondConv2d(16, 16, 3, stride=2, padding=1)),
        "cond4": lambda: Routed(layers.CondConv2d(16, 16, 4, padding="same", groups=4, bias=True)),
    }
    torch.manual_seed(0)
    agrees_or_is_refused(name, made[name]())


def test_first_linear_layers_of_vgg_read_the_whole_map_however_small_its_tiles() -> None:
    net = randomise(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), timm.models.vgg.ConvMlp(4, 8, kernel_size=3, drop_rate=0.0)))
    result = compare(net, some_mask(2, 4, 4), channels=2, patch=2)
    assert result.worst < 1e-8, result.where


@pytest.mark.parametrize("name", ["caformer_s18", "efficientvit_m0", "efficientformer_l1", "levit_128s", "mobilevitv2_050", "torchvision/swin_t"])
def test_attention_in_the_file_of_a_net_is_refused_by_name_before_anything_runs(name: str) -> None:
    with torch.device("meta"):
        net = torchvision.models.swin_t() if "/" in name else timm.create_model(name)
    with pytest.raises(mwm.sparse.PackedError, match=r"sparsify: module '.+' \(.*\) cannot run on packed tiles: it mixes all positions"):
        mwm.sparsify(net)
