"""Encoders by name: pyramids of timm and torchvision, with untouched weights and the keys of the plain model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "torchvision/"


class Pyramid(nn.Module):
    """The trunk of a torchvision classifier: its maps, the last one of each stride.

    State-dict keys are those of the plain model; the classifier is left out.

    Args:
        model: a torchvision classifier.

    Attributes:
        steps: dotted names of the modules that run one after the other.
        taps: of these, those whose output is returned.
        channels, strides: of the maps returned.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.steps = _steps(model, name)
        for step in self.steps:
            top = step.partition(".")[0]
            if top not in self._modules:
                self.add_module(top, getattr(model, top))
        self.taps, self.channels, self.strides = _probe(self)

    def forward(self, x: Any) -> list:
        """[B, C, H, W] or packed tiles to the maps, from fine to coarse."""
        maps = []
        for step in self.steps:
            x = self.get_submodule(step)(x)
            if step in self.taps:
                maps.append(x)
        return maps


# How torchvision's classifiers run their trunk, one after the other; "features.*" stands for the children of `features`.
_TRUNKS = {
    "ResNet": ["conv1", "bn1", "relu", "maxpool", "layer1.*", "layer2.*", "layer3.*", "layer4.*"],
    "DenseNet": ["features.*"],
    "VGG": ["features.*"],
    "AlexNet": ["features.*"],
    "SqueezeNet": ["features.*"],
    "MobileNetV2": ["features.*"],
    "MobileNetV3": ["features.*"],
    "EfficientNet": ["features.*"],
    "ConvNeXt": ["features.*"],
    "MNASNet": ["layers.*"],
    "RegNet": ["stem.*", "trunk_output.*"],
    "ShuffleNetV2": ["conv1.*", "maxpool", "stage2.*", "stage3.*", "stage4.*", "conv5.*"],
}


def _steps(model: nn.Module, name: str) -> tuple[str, ...]:
    trunk = _TRUNKS.get(type(model).__name__)
    if trunk is None:
        raise ValueError(f"create_encoder: {name!r} must be a torchvision CNN that runs as a chain ({', '.join(_TRUNKS)}), got a {type(model).__name__}. "
                         "Build it yourself, return a list of its maps and pass it to mwm.sparsify.")
    steps: list[str] = []
    for part in trunk:
        stem = part.removesuffix(".*")
        steps += [f"{stem}.{child}" for child, _ in getattr(model, stem).named_children()] if stem != part else [part]
    return tuple(steps)


def _probe(pyramid: Pyramid) -> tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]:
    """The last step of each stride, and what it returns, from one run on noise; no state of the modules or of torch's generator moves."""
    size, last = 128, {}
    training = {module: module.training for module in pyramid.modules()}
    x = torch.zeros(1, _input_channels(pyramid), size, size)
    try:
        pyramid.eval()
        with torch.no_grad():
            for step in pyramid.steps:
                x = pyramid.get_submodule(step)(x)
                last[size // x.shape[-1]] = (step, x.shape[1])
    finally:
        for module, mode in training.items():
            module.training = mode
    strides = tuple(sorted(stride for stride in last if stride > 1))
    return tuple(last[s][0] for s in strides), tuple(last[s][1] for s in strides), strides


def _input_channels(model: nn.Module) -> int:
    return next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))


def create_encoder(name: str, in_chans: int = 3, **settings: Any) -> nn.Module:
    """A dense pyramid by name, ready for `mwm.sparsify`.

    Args:
        name: a timm name such as "resnet50" or "convnext_tiny", or "torchvision/NAME" such as "torchvision/resnet50".
        in_chans: channels of the image.
        **settings: passed to the model's constructor, such as drop_path_rate, pretrained (timm) or weights (torchvision).

    Returns:
        A module that maps [B, in_chans, H, W] to the list of its maps, from fine to coarse, one per stride, with the attributes
        `channels` and `strides` (tuples). Weights are as the library makes them. State-dict keys are those of the plain model,
        except that timm joins the first dots of the names of some nets to underscores.

    Raises:
        ValueError: the name is unknown, or the net has no pyramid.
    """
    if not isinstance(in_chans, int) or in_chans < 1:
        raise ValueError(f"create_encoder: in_chans must be a positive integer, got {in_chans!r}.")
    if name.startswith(PREFIX):
        return _from_torchvision(name, in_chans, settings)
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.partition('.')[0]}*")[:3]
        raise ValueError(f"create_encoder: {name!r} is no model of timm{'; near are ' + ', '.join(near) if near else ''}. timm.list_models() lists them; "
                         "torchvision's are torchvision/NAME.")
    try:
        encoder = timm.create_model(name, features_only=True, in_chans=in_chans, **settings)
    except (RuntimeError, AttributeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"create_encoder: {name!r} must offer a pyramid of maps, got from timm: {error}. Choose a CNN.") from error
    encoder.channels = tuple(encoder.feature_info.channels())
    encoder.strides = tuple(encoder.feature_info.reduction())
    return encoder


def _from_torchvision(name: str, in_chans: int, settings: dict) -> nn.Module:
    from torchvision import models

    # Segmentation and detection models would fetch the weights of their backbones, although nobody asked for any.
    if name[len(PREFIX) :] not in models.list_models(module=models):
        raise ValueError(f"create_encoder: {name!r} is no classification model of torchvision. torchvision.models.list_models(torchvision.models) lists them.")
    model = models.get_model(name[len(PREFIX) :], **{"weights": None, **settings})
    first_name, first = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if first.in_channels != in_chans:
        parent = model.get_submodule(first_name.rpartition(".")[0])
        setattr(parent, first_name.rpartition(".")[2], _with_channels(first, in_chans))
    return Pyramid(model, name)


def _with_channels(conv: nn.Conv2d, in_chans: int) -> nn.Conv2d:
    new = nn.Conv2d(in_chans, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias is not None,
                    conv.padding_mode)
    with torch.no_grad():
        # Grey images of a net made for colour: the sum over colours keeps the scale of the answers of pre-trained weights.
        weight: Tensor = conv.weight
        new.weight.copy_(weight.sum(1, keepdim=True).expand_as(new.weight) / in_chans)
        if conv.bias is not None:
            new.bias.copy_(conv.bias)
    return new
