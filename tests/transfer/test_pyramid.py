"""The maps are those of the loaded weights, from plain timm and torchvision networks; the head answers at every pixel and learns fastest."""

from __future__ import annotations

import pytest
import timm
import torch

from mwm.train.export import Encoder, Preprocessing, full_model, head_keys
from mwm.transfer import TransferError
from mwm.transfer.pyramid import PyramidHead, mask_network, pyramid_groups, pyramid_of


def encoder_of(name: str, channels: int = 1) -> Encoder:
    model = full_model(name, channels, 2)
    return Encoder(model, name, head_keys(name, model), (), Preprocessing((64, 64), channels, (0.5,) * channels, (0.25,) * channels, {}))


@pytest.mark.parametrize(("name", "channels", "strides"), [
    ("resnet10t", (64, 64, 128, 256, 512), (2, 4, 8, 16, 32)),
    ("convnext_atto", (40, 80, 160, 320), (4, 8, 16, 32)),
    ("efficientnet_lite0", (16, 24, 40, 112, 320), (2, 4, 8, 16, 32)),
    ("torchvision/resnet18", (64, 64, 128, 256, 512), (2, 4, 8, 16, 32)),
    ("torchvision/mobilenet_v3_small", (16, 16, 24, 48, 576), (2, 4, 8, 16, 32)),
    ("torchvision/shufflenet_v2_x0_5", (24, 24, 48, 96, 1024), (2, 4, 8, 16, 32)),
])
def test_pyramids_have_one_map_per_stride_and_every_parameter_learns(name: str, channels: tuple[int, ...], strides: tuple[int, ...]) -> None:
    network = mask_network(encoder_of(name), 3, width=8)
    assert (network.encoder.channels, network.encoder.strides) == (channels, strides)
    logits = network(torch.rand(2, 1, 70, 96))
    assert logits.shape == (2, 3, 70, 96)
    logits.square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("name", ["resnet10t", "torchvision/resnet18"])
def test_maps_are_those_of_the_loaded_weights_and_share_no_memory(name: str) -> None:
    encoder = encoder_of(name, 3)
    pyramid, x = pyramid_of(encoder).eval(), torch.rand(1, 3, 64, 64)
    model = encoder.model.eval()
    with torch.no_grad():
        last = pyramid(x)[-1]
        if name == "resnet10t":
            expected = model.forward_features(x)
        else:
            expected = model.layer4(model.layer3(model.layer2(model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x))))))))
        assert torch.allclose(last, expected, atol=1e-5)
        for p in model.parameters():
            p.zero_()
        assert torch.equal(pyramid(x)[-1], last)


def test_coarse_pyramids_leave_the_finest_map_out() -> None:
    pyramid = pyramid_of(encoder_of("resnet10t"), least_stride=4)
    assert pyramid.strides == (4, 8, 16, 32)
    assert [m.shape[-1] for m in pyramid(torch.rand(1, 1, 64, 64))] == [16, 8, 4, 2]


def test_networks_are_made_of_plain_modules() -> None:
    for name in ("resnet10t", "torchvision/resnet18"):
        modules = {type(m).__module__ for m in mask_network(encoder_of(name), 2, width=8).modules()}
        assert {m for m in modules if m.startswith("mwm.")} == {"mwm.transfer.pyramid"}


def test_head_learns_fastest_and_stages_near_the_input_slowest() -> None:
    network = mask_network(encoder_of("resnet10t"), 2, width=8)
    groups = pyramid_groups(network.encoder, network.head, 1.0, 0.5, 0.1)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(rates) == len(list(network.parameters()))
    body, head = network.encoder.body, network.head
    assert rates[id(head.out.weight)] == rates[id(body.layer4[0].conv1.weight)] == 1.0
    assert rates[id(body.layer3[0].conv1.weight)] == 0.5
    assert rates[id(body.conv1[0].weight)] < 0.1
    assert decays[id(head.out.bias)] == 0.0
    assert decays[id(head.out.weight)] == 0.1


def test_group_norm_answers_do_not_depend_on_the_other_images() -> None:
    head, maps = PyramidHead((4, 8), 2, width=8), [torch.rand(3, 4, 8, 8), torch.rand(3, 8, 4, 4)]
    head.eval()
    alone = head([m[:1] for m in maps], (16, 16))
    assert torch.allclose(head(maps, (16, 16))[:1], alone, atol=1e-5)


@pytest.mark.parametrize(("arguments", "words"), [({"norm": "layer"}, "norm must be"), ({"width": 12}, "multiple of 8")])
def test_heads_refuse_settings_out_of_range(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PyramidHead((4, 8), 2, **arguments)


def test_networks_without_maps_are_refused_in_one_sentence() -> None:
    model = timm.create_model("mixer_s32_224", in_chans=1, num_classes=1)
    with pytest.raises(TransferError, match="maps of several strides") as caught:
        pyramid_of(Encoder(model, "mixer_s32_224", (), (), Preprocessing((224, 224), 1, (0.5,), (0.25,), {})))
    assert "\n" not in str(caught.value)
