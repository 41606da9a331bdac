"""`detector`: boxes of an open-vocabulary detector (Grounding DINO, OWLv2, OWL-ViT), painted into a soft region.

Sources: Grounding DINO, arXiv 2303.05499; OWL-ViT, arXiv 2205.06230; OWLv2, arXiv 2306.09683. Networks and preprocessing are those of transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mwm.localize.checkpoints import quiet_transformers
from mwm.localize.pretrained import read_pretrained
from mwm.localize.protocol import check_flag, check_images, check_whole, default_device

_KINDS = {
    "grounding-dino": ("GroundingDinoForObjectDetection", "GroundingDinoProcessor"),
    "mm-grounding-dino": ("MMGroundingDinoForObjectDetection", "GroundingDinoProcessor"),
    "owlv2": ("Owlv2ForObjectDetection", "Owlv2Processor"),
    "owlvit": ("OwlViTForObjectDetection", "OwlViTProcessor"),
}
_BOX_THRESHOLD = {"grounding-dino": 0.25, "mm-grounding-dino": 0.25, "owlv2": 0.1, "owlvit": 0.1}  # as transformers' own post-processing
_FLAT = 1e-6


class DetectorLocalizer:
    """Boxes around what the prompt names, as a region with soft edges.

    Every box whose score reaches `box_threshold` paints its score: in full from a little inside its edge, half of it on the edge, falling linearly to 0 a little
    outside (`soft_edge` of the box's width and height, half of it on either side); where boxes overlap the largest value counts. With `relative` the scores are
    divided by the image's best one first: those of zero-shot detectors are low numbers that say which box fits better than another, not how sure it is, and
    a cut at 0.5 would drop nearly all of them. A box of nearly the whole image says nothing and is dropped (`max_area`). An image without a box, and one of a
    single grey value, have an empty map.

    Grounding DINO reads the prompt in lower case with a full stop; phrases between full stops are looked for together. OWLv2 and OWL-ViT take the whole prompt as one query.

    Args:
        checkpoint: Hub name such as "IDEA-Research/grounding-dino-tiny" or "google/owlv2-base-patch16-ensemble", or a folder that `save_pretrained` wrote;
            weights as safetensors. A hub name is fetched where it is not in the local cache.
        device: Where the model runs.
        revision: Commit, branch or tag of a hub name; None for the preset's, else the newest.
        offline: Use only what is on disk.
        box_threshold: Least score of a box, in [0, 1]; None for 0.25 (Grounding DINO) or 0.1 (OWLv2, OWL-ViT).
        text_threshold: Grounding DINO: a box counts only where a word of the prompt scores more than this, in [0, 1].
        soft_edge: Width of the edge as a share of the box, in [0, 1]; 0 paints hard boxes.
        relative: Divide the scores by the best one of the image.
        max_area: Boxes that cover a larger share of the image are dropped, in [0, 1]; so are those thinner than a pixel.
        batch_size: Images that go through the model at once.

    Raises:
        ValueError: the checkpoint is no such detector, is not there, or cannot be fetched; a setting is out of range.
    """

    name = "detector"
    checkpoint_hint = "Give a hub name, for example IDEA-Research/grounding-dino-tiny or google/owlv2-base-patch16-ensemble, or a local folder."

    def __init__(
        self, checkpoint: str | Path, device: Any = None, *, revision: str | None = None, offline: bool = False, box_threshold: float | None = None,
        text_threshold: float = 0.25, soft_edge: float = 0.1, relative: bool = True, max_area: float = 0.95, batch_size: int = 4,
    ) -> None:
        for argument, value in {"box_threshold": box_threshold or 0.0, "text_threshold": text_threshold, "soft_edge": soft_edge, "max_area": max_area}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"detector: {argument} must be in [0, 1], got {value!r}.")
        check_whole(batch_size, "batch_size", self.name)
        for argument, flag in (("offline", offline), ("relative", relative)):
            check_flag(flag, argument, self.name)
        self.device = default_device(device)
        found = read_pretrained(checkpoint, self.name, _KINDS, "IDEA-Research/grounding-dino-tiny", revision=revision, offline=offline)
        self.kind, self.processor = found.kind, found.processor
        self.model = found.model.to(self.device)
        self.grounding = found.kind.endswith("grounding-dino")
        self.box_threshold = _BOX_THRESHOLD[found.kind] if box_threshold is None else box_threshold
        self.text_threshold, self.soft_edge, self.relative, self.max_area, self.batch_size = text_threshold, soft_edge, relative, max_area, batch_size
        text = self.model.config.text_config
        self._max_tokens = min(int(text.max_position_embeddings), int(getattr(self.model.config, "max_text_len", text.max_position_embeddings)))
        settings = (self.box_threshold, self.text_threshold if self.grounding else None, soft_edge, relative, max_area)
        self.fingerprint = f"detector {found.fingerprint} {settings}"

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Soft regions of the boxes that fit the prompts; see `Localizer`.

        Raises:
            ValueError: a prompt is longer than the model reads, or shapes do not fit.
        """
        maps = torch.zeros((len(images), *images.shape[-2:]), dtype=torch.float32)
        for index, (boxes, scores) in enumerate(self.boxes(images, prompts)):
            maps[index] = paint_boxes(boxes, scores, (maps.shape[1], maps.shape[2]), soft_edge=self.soft_edge, relative=self.relative)
        return maps.to(images.device)

    @torch.no_grad()
    def boxes(self, images: Tensor, prompts: list[str]) -> list[tuple[Tensor, Tensor]]:
        """The boxes behind the regions, best first.

        Args:
            images: float [B, C, H, W] in [0, 1]
            prompts: One text per image.

        Returns:
            Per image: boxes as left, top, right, bottom in pixels, clipped to the image, float32 [N, 4]; scores in [0, 1], float32 [N]. On the CPU.
        """
        check_images(images, prompts, self.name)
        texts = [self._text(prompt) for prompt in prompts]
        answers = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            answers += self._detect(images[part], texts[part])
        return answers

    def _detect(self, images: Tensor, texts: list[str]) -> list[tuple[Tensor, Tensor]]:
        height, width = images.shape[2:]
        x = images.detach().float().cpu()
        x = x if x.shape[1] in (1, 3) else x.mean(1, keepdim=True)
        pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
        padding = {"padding": True} if self.grounding else {"padding": "max_length", "max_length": self._max_tokens}  # OWL's processor joins texts one by one
        inputs = self.processor(images=list(pixels), text=texts if self.grounding else [[text] for text in texts], return_tensors="pt", **padding)
        answer = self.model(**{name: value.to(self.device) for name, value in inputs.items()})
        # Logits: Grounding DINO [B, Q, tokens], -inf behind the text; OWL [B, Q, 1], one query per image.
        scores = torch.sigmoid(answer.logits.float()).amax(-1).cpu()
        corners = _corners(answer.pred_boxes.float().cpu())
        # OWLv2 pads to a square, below and to the right; the others stretch or keep the ratio, and their boxes are relative to the image alone.
        scale = torch.tensor([max(height, width)] * 4 if self.kind == "owlv2" else [width, height, width, height], dtype=torch.float32)
        least = max(self.box_threshold, self.text_threshold) if self.grounding else self.box_threshold
        flat = (x.amax((1, 2, 3)) - x.amin((1, 2, 3))) < _FLAT
        found = []
        for one, score, empty in zip(corners * scale, scores, flat.tolist(), strict=True):
            one = torch.stack([one[:, 0].clamp(0, width), one[:, 1].clamp(0, height), one[:, 2].clamp(0, width), one[:, 3].clamp(0, height)], 1)
            wide, high = one[:, 2] - one[:, 0], one[:, 3] - one[:, 1]
            keep = (score > least) & (wide >= 1) & (high >= 1) & (wide * high <= self.max_area * height * width) & (not empty)  # written so that NaN is dropped
            order = score[keep].argsort(descending=True, stable=True)
            found.append((one[keep][order], score[keep][order]))
        return found

    def _text(self, prompt: str) -> str:
        """The prompt as the detector reads it, refused where it is too long."""
        text = prompt.strip()
        if self.grounding:
            text = text.lower()
            text = text if text.endswith(".") else text + "."
        with quiet_transformers(bars=False):
            count = len(self.processor.tokenizer(text)["input_ids"])
        if count > self._max_tokens:
            raise ValueError(f"detector: prompt must have at most {self._max_tokens} tokens, got {count} in {prompt[:60]!r}…. Shorten it.")
        return text


def paint_boxes(boxes: Tensor, scores: Tensor, size: tuple[int, int], *, soft_edge: float = 0.1, relative: bool = True) -> Tensor:
    """Boxes as one map: each paints its score with a soft edge, the largest counts.

    Args:
        boxes: Left, top, right, bottom in pixels. float [N, 4]
        scores: In [0, 1]. float [N]
        size: Height and width of the map.
        soft_edge: Width of the edge as a share of the box; the value on the edge itself is half the score.
        relative: Divide the scores by the largest.

    Returns:
        float32 [H, W] in [0, 1]; zero where there is no box.
    """
    painted = torch.zeros(size, dtype=torch.float32)
    if not len(scores):
        return painted
    heights = scores.float() / scores.max().float() if relative and float(scores.max()) > 0 else scores.float()
    across, down = torch.arange(size[1]) + 0.5, torch.arange(size[0]) + 0.5
    for (left, top, right, bottom), score in zip(boxes.float(), heights, strict=True):
        profile = _ramp(down, top, bottom, soft_edge)[:, None] * _ramp(across, left, right, soft_edge)[None, :]
        painted = torch.maximum(painted, score * profile)
    return painted.clamp(0, 1)


def _ramp(places: Tensor, start: Tensor, stop: Tensor, soft_edge: float) -> Tensor:
    """1 inside, 0 outside, linear over `soft_edge` of the length around either end. [L] → [L]"""
    inside = torch.minimum(places - start, stop - places)
    width = soft_edge * float(stop - start)
    return (inside / width + 0.5).clamp(0, 1) if width > 0 else (inside >= 0).float()


def _corners(boxes: Tensor) -> Tensor:
    """Centre and size to corners. [..., 4] → [..., 4]"""
    x, y, width, height = boxes.unbind(-1)
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], -1)
