"""`sam`: regions drawn to the edges of the image by a Segment Anything model, with boxes around their parts as prompts.

Sources: SAM, arXiv 2304.02643; SAM 2, arXiv 2408.00714; MedSAM, doi 10.1038/s41467-024-44824-z; boxes from a saliency map and votes of several masks: MedCLIP-SAMv2,
arXiv 2409.19483. Networks and preprocessing are those of transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from mwm.localize.pretrained import read_pretrained
from mwm.localize.protocol import check_images, check_whole, default_device
from mwm.localize.refine import component_boxes

_KINDS = {
    "sam": ("SamModel", "SamProcessor"),
    "sam2": ("Sam2Model", "Sam2Processor"),
    "sam2_video": ("Sam2Model", "Sam2Processor"),  # the published SAM 2 checkpoints; the image part is a subset
}
_LEAST_IOU = 0.01  # of a predicted IoU, so that agreement alone decides where the model trusts none of its masks
_AT_ONCE = 4  # boxes per call: masks of [boxes, 3, 1024, 1024] float32
_FLAT = 1e-6
_NEIGHBOURS = np.ones((3, 3), dtype=bool)


class SamRefiner:
    """Replaces each part of a region by the mask that a SAM draws for its box.

    The model answers a box with several masks. Each votes with weight predicted IoU × agreement, where agreement is the Dice of the mask with the part that
    the box came from; a pixel belongs to the answer with at least half of the weight. The part is kept as it was where the answer says nothing: it is empty, its
    Dice with the part is below `min_agreement`, it covers more than `max_area` of the image, or the image has a single grey value. `kept` counts such parts.
    A region without a pixel stays empty: it is never turned into a box of the whole image.

    Args:
        checkpoint: Preset, hub name such as "facebook/sam-vit-base", or a folder that `save_pretrained` wrote; SAM, SAM 2 and MedSAM; weights as safetensors, of the
            preset "medsam" as bare tensors.
        device: Where the model runs.
        revision: Commit, branch or tag of a hub name; None for the preset's, else the newest.
        offline: Use only what is on disk.
        boxes: "component": a box for each connected component; "joint": one box around all.
        margin: Each side of a box is moved out by this share of its width or height, in [0, 1].
        min_agreement: Least Dice between a part and its answer, in [0, 1].
        max_area: Largest share of the image that an answer may cover, in (0, 1].
        most: Components that get a box of their own, largest first; smaller ones are kept as they are.
        batch_size: Images that go through the encoder at once.

    Raises:
        ValueError: the checkpoint is no such model, is not there, or cannot be fetched; a setting is out of range.
    """

    name = "sam"

    def __init__(
        self, checkpoint: str | Path, device: Any = None, *, revision: str | None = None, offline: bool = False, boxes: str = "component", margin: float = 0.0,
        min_agreement: float = 0.1, max_area: float = 0.95, most: int = 16, batch_size: int = 2,
    ) -> None:
        if boxes not in ("component", "joint"):
            raise ValueError(f"sam: boxes must be component or joint, got {boxes!r}.")
        for argument, value in {"margin": margin, "min_agreement": min_agreement, "max_area": max_area}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"sam: {argument} must be in [0, 1], got {value!r}.")
        for argument, number in (("most", most), ("batch_size", batch_size)):
            check_whole(number, argument, self.name)
        self.device = default_device(device)
        found = read_pretrained(checkpoint, self.name, _KINDS, "facebook/sam-vit-base", revision=revision, offline=offline)
        self.kind, self.processor, self.model = found.kind, found.processor, found.model.to(self.device)
        self.boxes, self.margin, self.min_agreement, self.max_area, self.most, self.batch_size = boxes, margin, min_agreement, max_area, most, batch_size
        self.fingerprint = f"sam {found.fingerprint} {(boxes, margin, min_agreement, max_area, most)}"
        self.kept = 0

    @torch.no_grad()
    def __call__(self, images: Tensor, regions: Tensor) -> Tensor:
        """Regions with the outlines that the model draws.

        Args:
            images: float [B, C, H, W] in [0, 1]
            regions: What to refine; pixels above zero belong to it. float [B, H, W]

        Returns:
            0 or 1. float32 [B, H, W], on the CPU

        Raises:
            ValueError: shapes do not fit, or a region holds NaN.
        """
        check_images(images, ["region"] * len(images), self.name)
        if regions.shape != (len(images), *images.shape[2:]) or not bool(torch.isfinite(regions).all()):
            raise ValueError(f"sam: regions must be finite maps {[len(images), *images.shape[2:]]} like the images, got {list(regions.shape)}"
                             f"{'' if bool(torch.isfinite(regions).all()) else ' with NaN or infinity'}.")
        answers = (regions.detach().cpu() > 0).float()
        flat = (images.amax((1, 2, 3)) - images.amin((1, 2, 3))) < _FLAT
        self.kept += sum(len(self._parts(answers[i])) for i in range(len(images)) if bool(flat[i]))
        worth = [i for i in range(len(images)) if bool(answers[i].any()) and not bool(flat[i])]
        for start in range(0, len(worth), self.batch_size):
            part = worth[start : start + self.batch_size]
            embeddings, scale, reshaped = self._embed(images[part])
            for row, index in enumerate(part):
                one = embeddings[row : row + 1] if isinstance(embeddings, Tensor) else [level[row : row + 1] for level in embeddings]
                answers[index] = self._refine(answers[index].bool(), one, scale, reshaped).float()
        return answers

    def _embed(self, images: Tensor) -> tuple[Any, Tensor, tuple[int, int]]:
        """Image embeddings, the factors from pixels of the image to pixels of the input [x, y, x, y], and the part of the input that the image fills."""
        x = images.detach().float().cpu()
        x = x if x.shape[1] in (1, 3) else x.mean(1, keepdim=True)
        pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
        inputs = self.processor.image_processor(list(pixels), return_tensors="pt")
        values = inputs["pixel_values"]
        reshaped = inputs.get("reshaped_input_sizes")  # SAM pads below and to the right, SAM 2 stretches
        height, width = (int(edge) for edge in (reshaped[0] if reshaped is not None else values.shape[-2:]))
        scale = torch.tensor([width / images.shape[3], height / images.shape[2]] * 2)
        return self.model.get_image_embeddings(values.to(self.device)), scale, (height, width)

    def _parts(self, region: Tensor) -> list[tuple[Tensor, tuple[int, int, int, int]]]:
        """What gets a box: (mask, box as top, left, bottom, right), the largest first. [H, W]"""
        found = component_boxes(region)
        if self.boxes == "joint" or len(found) == 1:
            return [(region > 0, (min(b[0] for b in found), min(b[1] for b in found), max(b[2] for b in found), max(b[3] for b in found)))] if found else []
        labels, count = ndimage.label(region.numpy() > 0, structure=_NEIGHBOURS)
        areas = np.bincount(labels.ravel(), minlength=count + 1)
        order = sorted(range(1, count + 1), key=lambda label: (-areas[label], label))  # as component_boxes
        return [(torch.from_numpy(labels == label), box) for label, box in zip(order, found, strict=True)]

    def _refine(self, region: Tensor, embedding: Any, scale: Tensor, reshaped: tuple[int, int]) -> Tensor:
        """One region. bool [H, W] → bool [H, W]"""
        parts = self._parts(region)
        answer = torch.zeros_like(region)
        for mask, _ in parts[self.most :]:
            answer |= mask
        parts = parts[: self.most]
        for start in range(0, len(parts), _AT_ONCE):
            some = parts[start : start + _AT_ONCE]
            boxes = torch.stack([self._prompt(box, region.shape) for _, box in some]) * scale
            masks, scores = self._masks(embedding, boxes, (region.shape[0], region.shape[1]), reshaped)
            for (part, _), candidates, trust in zip(some, masks, scores, strict=True):
                voted = vote(candidates, trust, part)
                if float(voted.double().mean()) > self.max_area or _dice(voted, part) < max(self.min_agreement, 1e-9):
                    voted, self.kept = part, self.kept + 1
                answer |= voted
        return answer

    def _prompt(self, box: tuple[int, int, int, int], shape: torch.Size) -> Tensor:
        """Left, top, right, bottom with the margin, clipped to the image. float32 [4]"""
        top, left, bottom, right = box
        down, across = self.margin * (bottom - top), self.margin * (right - left)
        return torch.tensor([max(0.0, left - across), max(0.0, top - down), min(float(shape[1]), right + across), min(float(shape[0]), bottom + down)])

    def _masks(self, embedding: Any, boxes: Tensor, size: tuple[int, int], reshaped: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Several masks for each box. [N, 4] in pixels of the input → bool [N, M, H, W], predicted IoU float32 [N, M]"""
        output = self.model(image_embeddings=embedding, input_boxes=boxes[None].to(self.device), multimask_output=True)
        logits = output.pred_masks[0].float()
        if self.kind == "sam":
            padded = self.processor.image_processor.pad_size
            logits = F.interpolate(logits, (padded["height"], padded["width"]), mode="bilinear", align_corners=False)[..., : reshaped[0], : reshaped[1]]
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return (logits > 0).cpu(), output.iou_scores[0].float().cpu()


def vote(masks: Tensor, scores: Tensor, part: Tensor) -> Tensor:
    """One mask from several: those with at least half of the weight predicted IoU × Dice with `part`.

    Args:
        masks: Candidates. bool [M, H, W]
        scores: Predicted IoU. float [M]
        part: What they are to agree with. bool [H, W]

    Returns:
        bool [H, W]; empty where no candidate touches the part.
    """
    weights = torch.tensor([max(float(score), _LEAST_IOU) * _dice(mask, part) for mask, score in zip(masks, scores, strict=True)])
    if float(weights.sum()) <= 0 or not bool(torch.isfinite(weights).all()):
        return torch.zeros_like(part)
    return (weights[:, None, None] * masks).sum(0) >= 0.5 * weights.sum()


def _dice(a: Tensor, b: Tensor) -> float:
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else 0.0
