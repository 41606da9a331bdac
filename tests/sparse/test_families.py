"""Each family of CNNs, sparsified, against the oracle: outputs, gradients of all parameters, running statistics."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
import torchvision
from comparison import compare, maps_of, randomise, some_mask
from torch import nn

import mwm

# The smallest of each family; "torchvision/…" are whole classifiers, so that heads are covered as well.
FAMILIES = [
    "test_resnet", "resnet18", "resnext26ts", "regnety_002", "test_convnext", "test_convnext2", "convnextv2_atto", "test_efficientnet", "test_efficientnet_gn",
    "mobilenetv3_small_050",
    "tf_efficientnetv2_b0", "densenet121", "res2net50_14w_8s", "resnetblur18", "ecaresnet26t", "seresnext26ts", "inception_next_atto",
    "hgnetv2_b0", "ghostnet_050", "dla34", "test_nfnet", "test_byobnet",
    "torchvision/resnet18", "torchvision/mobilenet_v3_small", "torchvision/shufflenet_v2_x0_5", "torchvision/regnet_x_400mf",
]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("torchvision/"):
        return torchvision.models.get_model(name.partition("/")[2], weights=None, num_classes=5)
    depth = {"depths": (1, 1, 2, 1)} if name.startswith("convnext") else {}
    return timm.create_model(name, features_only=True, in_chans=2, **depth)


def without_drop(net: nn.Module) -> nn.Module:
    """Noise off: dense and packed would draw it differently."""
    for module in net.modules():
        for attribute in ("drop_prob", "p"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return net


@pytest.mark.parametrize("name", FAMILIES)
def test_family_agrees_with_mask_multiply(name: str) -> None:
    net = randomise(without_drop(build(name)))
    channels = 3 if "/" in name else 2
    active = some_mask(3, 3, 2)
    active[1] = False  # an image with no visible patch
    result = compare(net, active, channels=channels, train=True)
    assert result.maps >= (1 if "/" in name else 4)
    assert result.hidden == 0.0
    assert result.worst < 1e-7, result.where


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext2", "test_efficientnet", "mobilenetv3_small_050"])
def test_family_agrees_with_mask_multiply_in_eval_mode(name: str) -> None:
    result = compare(randomise(build(name)), some_mask(2, 2, 3, seed=5), channels=2, train=False)
    assert result.worst < 1e-7, result.where


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet_gn", "resnetblur18", "test_nfnet"])
def test_all_visible_equals_the_dense_network(name: str) -> None:
    dense = randomise(without_drop(build(name))).double().train()
    sparse = mwm.sparsify(copy.deepcopy(dense))
    images = torch.randn(2, 2, 64, 96, dtype=torch.float64)
    expected = maps_of(dense(images))
    found = maps_of(sparse(mwm.pack(images, torch.ones(2, 2, 3, dtype=torch.bool))))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.unpack(), b, rtol=1e-8, atol=1e-9)
    for a, b in zip(sparse.buffers(), dense.buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["torchvision/vgg11", "torchvision/densenet121", "torchvision/convnext_tiny"])
def test_other_torchvision_trunks_agree_with_mask_multiply(name: str) -> None:
    encoder = {"torchvision/vgg11": lambda m: m.features, "torchvision/densenet121": lambda m: m.features[:6], "torchvision/convnext_tiny": lambda m: m.features[:4]}
    net = randomise(without_drop(encoder[name](build(name))))
    result = compare(net, some_mask(2, 2, 2, seed=2), channels=3, train=True)
    assert result.worst < 1e-7, result.where


class ConvInstanceNorm(nn.Sequential):
    """Conv–InstanceNorm–LeakyReLU stages, as nnU-Net's encoder has them."""

    def __init__(self, widths: tuple[int, ...] = (4, 8, 8), track: bool = False) -> None:
        stages, before = [], 1
        for i, width in enumerate(widths):
            stages += [nn.Conv2d(before, width, 3, stride=1 if i == 0 else 2, padding=1), nn.InstanceNorm2d(width, affine=True, track_running_stats=track),
                       nn.LeakyReLU(inplace=True)]
            before = width
        super().__init__(*stages)


def test_conv_instancenorm_leakyrelu_normalises_each_image_over_its_visible_positions() -> None:
    result = compare(randomise(ConvInstanceNorm()), some_mask(3, 3, 2), channels=1, patch=8)
    assert result.worst < 1e-8, result.where


@pytest.mark.parametrize("name", ["resnet50_gn", "resnetv2_50x1_bit"])
def test_group_norm_nets_normalise_each_image_over_its_visible_positions(name: str) -> None:
    full = timm.create_model(name, in_chans=1, num_classes=3)
    stages = full.layer1[:1] if name == "resnet50_gn" else full.stages[0].blocks[:1]
    stem = nn.Sequential(full.conv1, full.bn1, full.maxpool) if name == "resnet50_gn" else full.stem
    result = compare(randomise(nn.Sequential(stem, stages)), some_mask(3, 2, 2, seed=4), channels=1, patch=16)
    assert result.worst < 1e-8, result.where


class Sideways(nn.Module):
    """What hides in forwards: same padding by hand, bands, F.pad, upsampling, sums and means over H and W, views over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 4, stride=4)
        self.wide, self.tall = nn.Conv2d(8, 8, (1, 11), padding=(0, 5), groups=8), nn.Conv2d(8, 8, (11, 1), padding=(5, 0), groups=8)
        self.same = nn.Conv2d(8, 8, 4, padding="same", dilation=2)
        self.down = nn.Conv2d(8, 8, 2, stride=2)
        self.reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.up = nn.Upsample(scale_factor=2)
        self.smooth = nn.Upsample(scale_factor=2, mode="bilinear")

    def forward(self, x):
        x = self.stem(x)
        x = x + self.wide(x) + self.tall(x) + self.same(x)
        low = self.down(x)
        x = torch.cat([x, self.up(low), self.smooth(low)], 1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        x = x * torch.sigmoid(x.sum((2, 3), keepdim=True) * 0.01) + x.amax((2, 3), keepdim=True) * x.std((2, 3), keepdim=True)
        x = nn.functional.pad(x, (0, 1, 0, 1))
        x = nn.functional.max_pool2d(x, 2, stride=1)
        x = nn.functional.avg_pool2d(nn.functional.pad(x[:, :8], (1, 1, 1, 1)), 3, stride=1) - self.reflect(x[:, 8:16])
        return [x, nn.functional.interpolate(low, size=x.shape[-2:], mode="nearest"), x.mean((2, 3))]


def test_sideways_work_inside_forwards_agrees_with_mask_multiply() -> None:
    result = compare(Sideways(), some_mask(3, 3, 2, seed=7), channels=2)
    assert result.worst < 1e-8, result.where


def test_whole_classifiers_return_one_row_per_image() -> None:
    for name in ("test_resnet", "test_efficientnet", "test_convnext"):
        net = mwm.sparsify(timm.create_model(name, num_classes=5, in_chans=1)).eval()
        out = net(mwm.pack(torch.randn(3, 1, 96, 64), some_mask(3, 3, 2)))
        assert out.shape == (3, 5)


def test_vgg_classifier_reads_the_zero_filled_map() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = mwm.sparsify(torchvision.models.VGG(torchvision.models.vgg.make_layers([4, "M", 8, "M"]), num_classes=3, init_weights=False)).eval()
    net.classifier = nn.Sequential(nn.Flatten(), nn.Linear(8 * 49, 3))
    packed = mwm.pack(torch.randn(2, 3, 56, 56), some_mask(2, 7, 7))
    expected = net.classifier(net.avgpool(net.features(packed).unpack()).flatten(1))
    assert torch.allclose(net(packed), expected)
