"""The feature maps of an encoder, and a small head on them that answers at every pixel. Plain timm and torchvision networks only."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mwm.train import TrainError
from mwm.train.export import Encoder, name_map
from mwm.transfer.config import TransferError
from mwm.transfer.network import stage_of

NORMS = ("group", "batch")
_PROBE = 128  # pixels: a multiple of every stride up to 64
_STRIDES = (2, 4, 8, 16, 32, 64)


class FeaturePyramid(nn.Module):
    """Maps of an encoder from fine to coarse, one per stride.

    Args:
        body: Returns the maps as a list or a dict.
        keep: Which of them to give out, by place.
        channels: Of the maps given out.
        strides: Of the maps given out.
    """

    def __init__(self, body: nn.Module, keep: Sequence[int], channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        self.body, self.keep, self.channels, self.strides = body, tuple(keep), tuple(channels), tuple(strides)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, C, H, W] -> [[B, K, H / s, W / s] for each stride s]"""
        maps = self.body(images)
        maps = list(maps.values()) if isinstance(maps, dict) else list(maps)
        return [maps[k] for k in self.keep]


def pyramid_of(encoder: Encoder, *, least_stride: int = 2) -> FeaturePyramid:
    """The maps of a loaded encoder, with its weights.

    timm encoders are built again with `features_only`; of torchvision's, the last module of each stride is tapped. What only the classifier
    needs is left out. The result shares no tensors with `encoder.model`.

    Args:
        encoder: From `mwm.train.load_encoder`.
        least_stride: Maps finer than this are left out.

    Raises:
        TransferError: the encoder has no maps of several strides.
    """
    channels = encoder.preprocessing.channels
    try:
        if encoder.name.startswith("torchvision/"):
            body = _torchvision_body(encoder)
        else:
            import timm

            body = timm.create_model(encoder.name, features_only=True, in_chans=channels)
            state = encoder.model.state_dict()
            body.load_state_dict({key: state[name].detach().cpu() for key, name in name_map(body, encoder.model).items()})
        shapes = _shapes(body, channels)
    except (RuntimeError, AttributeError, AssertionError, NotImplementedError, ValueError, TypeError) as error:
        if isinstance(error, TrainError):
            raise
        raise TransferError(f"finetune: encoder must offer maps of several strides for masks and boxes, got {encoder.name}, which does not ({type(error).__name__}). "
                            "Pre-train a CNN such as resnet50.") from error
    keep = [k for k, (_, stride) in enumerate(shapes) if stride >= least_stride]
    if len(keep) < 2:
        raise TransferError(f"finetune: encoder must offer maps of several strides for masks and boxes, got strides {[s for _, s in shapes]} of {encoder.name}. "
                            "Pre-train a CNN such as resnet50.")
    return FeaturePyramid(body, keep, [shapes[k][0] for k in keep], [shapes[k][1] for k in keep])


def _torchvision_body(encoder: Encoder) -> nn.Module:
    """The torchvision model cut after its last map, which returns the last map of each stride."""
    from torchvision.models.feature_extraction import create_feature_extractor

    last: dict[int, str] = {}
    handles = []

    def watch(name: str):
        def hook(_module: nn.Module, _inputs: tuple, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] and _PROBE % output.shape[2] == 0:
                last[_PROBE // output.shape[2]] = name
        return hook

    model = copy.deepcopy(encoder.model).cpu().eval()  # the parts of the extractor are those of the model
    for name, module in model.named_modules():
        # Maps inside a block are no stage's result, and a pooled vector is no map.
        if name and name.count(".") <= 1 and not isinstance(module, nn.AdaptiveAvgPool2d):
            handles.append(module.register_forward_hook(watch(name)))
    with torch.no_grad():
        model(torch.zeros(1, encoder.preprocessing.channels, _PROBE, _PROBE))
    for handle in handles:
        handle.remove()
    nodes = {name: f"stride{stride}" for stride, name in sorted(last.items()) if stride in _STRIDES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that train and eval graphs of dropout differ is expected
        return create_feature_extractor(model, nodes)


@torch.no_grad()
def _shapes(body: nn.Module, channels: int) -> list[tuple[int, int]]:
    """(channels, stride) of every map."""
    training = body.training
    maps = body.eval()(torch.zeros(1, channels, _PROBE, _PROBE))
    body.train(training)
    return [(m.shape[1], _PROBE // m.shape[2]) for m in (maps.values() if isinstance(maps, dict) else maps)]


class PyramidHead(nn.Module):
    """Logits of every pixel from a pyramid: each map through a 1x1, coarse added to fine, a 3x3 with norm after every sum.

    y_last = block(lateral(m_last)); y_i = block(lateral(m_i) + upsample(y_{i+1})); logits = upsample(1x1(y_0)). The top-down path is that of
    feature pyramid networks (Lin et al. 2017, arXiv 1612.03144); as in a U-Net it goes on to the finest map.

    Args:
        channels: Of the maps, from fine to coarse.
        classes: Outputs per pixel.
        width: Channels of the head.
        norm: "group" (independent of the batch) or "batch".
        dropout: Share of whole channels dropped before the last 1x1.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, channels: Sequence[int], classes: int, *, width: int = 64, norm: str = "group", dropout: float = 0.1) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"PyramidHead: norm must be {' | '.join(NORMS)}, got {norm!r}.")
        if width < 8 or width % 8:
            raise ValueError(f"PyramidHead: width must be a multiple of 8, got {width}.")
        self.lateral = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False),
                                                  nn.GroupNorm(8, width) if norm == "group" else nn.BatchNorm2d(width),
                                                  nn.ReLU(inplace=True)) for _ in channels)
        self.dropout = nn.Dropout2d(dropout)
        self.out = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Maps from fine to coarse [[B, K, h, w], …] -> logits [B, classes, *size]"""
        y = self.blocks[-1](self.lateral[-1](maps[-1]))
        for k in range(len(maps) - 2, -1, -1):
            fine = self.lateral[k](maps[k])
            y = self.blocks[k](fine + F.interpolate(y, fine.shape[-2:], mode="bilinear", align_corners=False))
        return F.interpolate(self.out(self.dropout(y)).float(), size, mode="bilinear", align_corners=False)


class SegmentationNetwork(nn.Module):
    """An encoder's pyramid with a head for masks: [B, C, H, W] -> logits float32 [B, classes, H, W]

    Args:
        pyramid: From `pyramid_of`.
        head: On its channels.
    """

    def __init__(self, pyramid: FeaturePyramid, head: PyramidHead) -> None:
        super().__init__()
        self.encoder, self.head = pyramid, head

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits float32 [B, classes, H, W]"""
        return self.head(self.encoder(images), images.shape[-2:])


def mask_network(encoder: Encoder, outputs: int, *, width: int = 64, norm: str = "group") -> SegmentationNetwork:
    """An encoder's pyramid with a fresh head.

    Args:
        encoder: Loaded, or of random weights.
        outputs: Classes and background.
        width: Channels of the head.
        norm: Of the head: "group" or "batch".
    """
    pyramid = pyramid_of(encoder)
    return SegmentationNetwork(pyramid, PyramidHead(pyramid.channels, outputs, width=width, norm=norm))


def pyramid_groups(encoder: nn.Module, heads: nn.Module, lr: float, layer_decay: float, weight_decay: float) -> list[dict]:
    """Groups for AdamW: the heads learn at `lr`, each stage of the encoder `layer_decay` times slower than the next; norms and biases do not decay.

    Args:
        encoder: A `FeaturePyramid`.
        heads: Everything else that learns.
        lr: Learning rate of the heads and of the encoder's last stage.
        layer_decay: Factor per stage.
        weight_decay: Of weights with two or more dimensions.
    """
    body = encoder.body if isinstance(encoder, FeaturePyramid) else encoder
    named = [(name, p) for name, p in body.named_parameters() if p.requires_grad]
    stages = list(dict.fromkeys(stage_of(name) for name, _ in named))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for depth, parameter in [*((len(stages) - stages.index(stage_of(name)) - 1, p) for name, p in named), *((0, p) for p in heads.parameters())]:
        key = (lr * layer_decay**depth, weight_decay if parameter.ndim > 1 else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]
