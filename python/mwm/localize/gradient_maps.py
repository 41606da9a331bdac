"""`gradcam` and `gscorecam`: cheap maps from the activations of one block of a CLIP-like model, for comparison with `bottleneck`.

On retrieval-type maps both follow the text less than M2IB does (Koleilat et al., arXiv 2409.19483, report Dice 0.30 and 0.61 against 0.78 after SAM).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mwm.localize.bottleneck import to_maps, which_layer
from mwm.localize.capacity import COSINE_EPS
from mwm.localize.presets import pinned
from mwm.localize.protocol import check_flag, check_images, check_whole
from mwm.localize.towers import load_tower


class GradcamLocalizer:
    """Grad-CAM (Selvaraju et al. 2017) on patch tokens: relu(Σ_c w_c h_c), w_c the mean over patches of the derivative of the cosine in channel c.

    Args:
        checkpoint: Name of a preset (`mwm localize --list`), a hub name, or a local folder; as for `bottleneck`.
        device: Where it runs.
        layer: Block whose output is weighted, 0-based; None for the last but one, the last that still mixes patches into the embedding.
        batch_size: Images that go through the model at once.
        revision: Commit, branch or tag of a hub name; None for the preset's, else the newest.
        offline: Use only what is on disk.
        trust_remote_code: Let transformers run code that comes with the checkpoint.

    Attributes:
        training: What the checkpoint learnt from in `mwm localize train`, or None.
        map_grid: Rows and columns of a map before it is brought to the image's size.
        similarity: Cosines of the last call's images and prompts. float32 [B]; None before the first.

    Raises:
        ValueError: the checkpoint or layer does not fit. From a call: a prompt is too long, or a map is not finite.
    """

    name = "gradcam"
    checkpoint_hint = "Give a preset such as biomedclip (mwm localize --list), a hub name, or a local folder."

    def __init__(self, checkpoint: str | Path, device: Any = None, *, layer: int | None = None, batch_size: int = 8, revision: str | None = None,
                 offline: bool = False, trust_remote_code: bool = False) -> None:
        source, revision, _ = pinned(checkpoint, self.name, revision)
        check_whole(batch_size, "batch_size", self.name)
        for argument, flag in (("offline", offline), ("trust_remote_code", trust_remote_code)):
            check_flag(flag, argument, self.name)
        self.tower = load_tower(source, device, name=self.name, offline=offline, trust_remote_code=trust_remote_code, revision=revision)
        self.training, self.map_grid = self.tower.training, self.tower.grid
        self.layer, self.batch_size = which_layer(layer, self.tower.depth - 2, self.tower.depth, self.name), batch_size
        self._suffix = self.tower.suffix(self.layer)
        self.fingerprint = f"{self.name} 1 {self.tower.fingerprint} {self.layer}"
        self.similarity: Tensor | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Maps of what the prompts name; see `Localizer`. An image of one colour, or one without a positive channel, gets an empty map."""
        check_images(images, prompts, self.name)
        if not len(images):
            return images.new_zeros((0, *images.shape[2:]), dtype=torch.float32)
        text = self.tower.text(list(prompts))
        maps, cosines = [], []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            pixels = self.tower.preprocess(images[part])
            h = self.tower.prefix(pixels, self.layer)
            gradient, cosine = self._gradient(h, text[part])
            cosines.append(cosine)
            maps.append(to_maps(self._map(h, gradient, pixels, text[part]), images[part], self.name))
        self.similarity = torch.cat(cosines).to(images.device)
        return torch.cat(maps)

    def _gradient(self, h: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Derivative of each image's cosine in its tokens, and the cosine. [B, T, D], [B, E] → [B, T, D], [B]"""
        h = h.detach().requires_grad_()
        with torch.enable_grad():
            cosine = F.cosine_similarity(text, self._suffix(h), dim=-1, eps=COSINE_EPS)
            (gradient,) = torch.autograd.grad(cosine.sum(), h)
        return gradient, cosine.detach()

    def _channels(self, x: Tensor) -> Tensor:
        """Patch tokens as channel maps. [B, T, D] → [B, D, h, w]"""
        return x[:, self.tower.leading :].transpose(1, 2).reshape(len(x), -1, *self.tower.grid)

    def _map(self, h: Tensor, gradient: Tensor, pixels: Tensor, text: Tensor) -> Tensor:
        weights = self._channels(gradient).mean((2, 3), keepdim=True)
        return (weights * self._channels(h)).sum(1).relu()


class GscorecamLocalizer(GradcamLocalizer):
    """gScoreCAM (Chen et al., ACCV 2022): the channels with the largest gradients, each weighted by how well the image, seen through it, matches the text.

    Largest with their sign, as in the authors' code: a channel that speaks against the text is not chosen. For each of the chosen channels the activation map, from 0 to 1,
    multiplies the image, which goes through the whole model again; the model's logits (cosine times its temperature), through a softmax, are the weights of relu(Σ w_c h_c).
    Unlike in the authors' code channels that were not chosen have no weight, and what is hidden is black. Costs `channels` passes per image.

    Args:
        checkpoint: As for `gradcam`, and so are the arguments that are not listed here.
        device: Where it runs.
        channels: Channels that are scored; None for a tenth of them, which is the share of the paper (300 of 3072).
        layer: As for `gradcam`.
        batch_size: Images, and masked images, that go through the model at once.
        revision: As for `gradcam`.
        offline: As for `gradcam`.
        trust_remote_code: As for `gradcam`.

    Raises:
        ValueError: as for `gradcam`, or `channels` is not in 1 … the model's width.
    """

    name = "gscorecam"

    def __init__(self, checkpoint: str | Path, device: Any = None, *, channels: int | None = None, layer: int | None = None, batch_size: int = 8,
                 revision: str | None = None, offline: bool = False, trust_remote_code: bool = False) -> None:
        super().__init__(checkpoint, device, layer=layer, batch_size=batch_size, revision=revision, offline=offline, trust_remote_code=trust_remote_code)
        width = len(self.tower.blocks[0].norm1[0])
        self.channels = max(1, width // 10) if channels is None else channels
        if isinstance(self.channels, bool) or not isinstance(self.channels, int) or not 1 <= self.channels <= width:
            raise ValueError(f"gscorecam: channels must be in 1 … {width}, got {channels!r}.")
        self.fingerprint += f" {self.channels} signed, logits"

    def _map(self, h: Tensor, gradient: Tensor, pixels: Tensor, text: Tensor) -> Tensor:
        strongest = self._channels(gradient).mean((2, 3)).topk(self.channels, dim=1).indices
        maps = self._channels(h)
        return torch.stack([self._scored(maps[k, strongest[k]], pixels[k], text[k : k + 1]) for k in range(len(maps))])

    def _scored(self, maps: Tensor, pixels: Tensor, text: Tensor) -> Tensor:
        """[K, h, w], [3, H, W], [1, E] → [h, w]"""
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        shown = F.interpolate(((maps - low) / (high - low).clamp(min=1e-12))[:, None], pixels.shape[1:], mode="bilinear", align_corners=False)
        black = (0 - self.tower.mean) / self.tower.std
        scores = [F.cosine_similarity(text, self._suffix(self.tower.prefix(black + part * (pixels - black), self.layer)), dim=-1, eps=COSINE_EPS)
                  for part in shown.split(self.batch_size)]
        return (torch.softmax(self.tower.logit_scale * torch.cat(scores), 0)[:, None, None] * maps).sum(0).relu()
