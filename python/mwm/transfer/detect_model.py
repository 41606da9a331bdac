"""Mask R-CNN (Faster R-CNN without masks) with a feature pyramid on any encoder that has maps at strides 4, 8, 16 and 32.

He et al. 2017 (arXiv 1703.06870), built from torchvision's parts. What torchvision sizes for pictures of 800 pixels (anchors, the level that a
box is read from) is sized for the run's images here, and the heads have group norm, which does not care how small the batch is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from mwm.transfer.config import TransferError
from mwm.transfer.pyramid import FeaturePyramid

_REFERENCE_EDGE = 800.0  # shorter edge of the pictures that torchvision's sizes are for
_PROPOSALS = {"training": 500, "testing": 300}
_CANDIDATES = {"training": 1000, "testing": 500}


class Detector(nn.Module):
    """An encoder's pyramid, a feature pyramid network, proposals, and heads for classes, boxes and masks.

    Args:
        pyramid: Of the encoder, strides 4 and more.
        classes: Number of classes, background not counted.
        size: (height, width) of the images, pixels.
        masks: Whether to learn masks.
        width: Channels of the feature pyramid and the heads, a multiple of 8.
        frozen: Keep the running statistics of the encoder's batch norms as they are; scales and shifts still learn.
        detections: Most detections per image.
        least_score: Detections below are dropped.

    Raises:
        TransferError: the encoder lacks one of the strides, or the width does not fit.
    """

    def __init__(self, pyramid: FeaturePyramid, classes: int, size: tuple[int, int], *, masks: bool, width: int = 256, frozen: bool = False,
                 detections: int = 100, least_score: float = 0.01) -> None:
        super().__init__()
        if tuple(pyramid.strides) != (4, 8, 16, 32):
            raise TransferError(f"finetune: encoder must have maps at strides 4, 8, 16 and 32 for detection, got {list(pyramid.strides)}. Pre-train a ResNet or ConvNeXt.")
        if width < 16 or width % 8:
            raise TransferError(f"finetune: detect_width must be a multiple of 8, at least 16, got {width}.")
        self.encoder, self.masks, self.frozen = pyramid, masks, frozen
        group_norm = lambda channels: nn.GroupNorm(8, channels)  # noqa: E731
        self.fpn = FeaturePyramidNetwork(list(pyramid.channels), width, LastLevelMaxPool(), norm_layer=group_norm)
        # An anchor is at least two strides of its map: below that, and where boxes are read from coarser maps, an object falls between the cells.
        share = min(1.0, max(0.25, min(size) / _REFERENCE_EDGE))
        anchors = AnchorGenerator(tuple((32 * share * 2**level, 32 * share * 2 ** (level + 0.5)) for level in range(5)), ((0.5, 1.0, 2.0),) * 5)
        head = RPNHead(width, anchors.num_anchors_per_location()[0])
        self.rpn = RegionProposalNetwork(anchors, head, 0.7, 0.3, 256, 0.5, dict(_CANDIDATES), dict(_PROPOSALS), 0.7)
        names = ["0", "1", "2", "3"]
        pool = lambda edge: MultiScaleRoIAlign(names, edge, 2, canonical_scale=round(224 * share))  # noqa: E731
        hidden = 4 * width
        mask_parts = (pool(14), MaskRCNNHeads(width, (width,) * 4, 1, group_norm), MaskRCNNPredictor(width, width, classes + 1)) if masks else (None,) * 3
        self.roi_heads = RoIHeads(pool(7), FastRCNNConvFCHead((width, 7, 7), [width] * 2, [hidden], group_norm), FastRCNNPredictor(hidden, classes + 1),
                                  0.5, 0.5, 128, 0.25, None, least_score, 0.5, detections, *mask_parts)
        for module in (head, self.roi_heads.box_predictor, self.roi_heads.mask_predictor):
            if module is not None:
                module.register_forward_hook(_to_float)  # losses and boxes in float32, also under autocast

    def train(self, mode: bool = True) -> Detector:
        """Train or eval mode; frozen batch norms stay in eval mode."""
        super().train(mode)
        if self.frozen:
            for module in self.encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    @property
    def heads(self) -> nn.ModuleList:
        """Everything but the encoder."""
        return nn.ModuleList([self.fpn, self.rpn, self.roi_heads])

    def forward(self, images: Tensor, targets: Sequence[dict[str, Tensor]] | None = None) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses where targets are given, else detections; train and eval mode concern norms and dropout alone.

        Args:
            images: Normalised. [B, C, H, W]
            targets: Per image boxes float32 [N, 4] (x0, y0, x1, y1, pixels), labels int64 [N] from 1, masks uint8 [N, H, W].

        Returns:
            Losses by name, or per image boxes [D, 4], labels int64 [D] from 1, scores [D], and masks, probabilities in the box [D, 1, 28, 28].
        """
        maps = self.fpn({str(k): m for k, m in enumerate(self.encoder(images))})
        maps = {name: m.float() for name, m in maps.items()}  # anchors take the maps' type, and need whole pixels
        sizes = [tuple(images.shape[-2:])] * len(images)
        learning = targets is not None
        self.rpn.training = self.roi_heads.training = learning
        targets = None if targets is None else list(targets)
        proposals, losses = self.rpn(ImageList(images, sizes), maps, targets)
        detections, further = self.roi_heads(maps, proposals, sizes, targets)
        return losses | further if learning else detections


def _to_float(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float()
    return type(output)(_to_float(_module, _inputs, part) for part in output)


def total_loss(losses: dict[str, Tensor]) -> Tensor:
    """Sum of all losses, unweighted as in the paper."""
    return torch.stack(list(losses.values())).sum()
