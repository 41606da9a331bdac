"""`edges`: where an image has many and strong edges, whatever the text says; a baseline without learning or annotation.

Hiding what has structure is what masking by gradients (for example in the histogram-of-gradients targets of Wei et al. 2022) amounts to; guided masking has to
be better than that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mwm.data import Record
from mwm.localize.protocol import check_images, default_device


class EdgesLocalizer:
    """Local edge strength.

    score = G(wide) * |grad (G(fine) * grey)|, with Gaussians of `fine` and `wide` times the image's edge (the root of its area), divided by its largest value.
    It does not change when the image is multiplied by a factor or offset by a constant. Each image is computed alone.

    Args:
        device: Where it runs; the first CUDA device where there is one, else the CPU.
        fine: Standard deviation of the smoothing before the gradient, as a share of the image's edge.
        wide: That of the averaging of gradients.

    Raises:
        ValueError: a width is not in (0, 1].
    """

    name = "edges"

    def __init__(self, device: Any = None, *, fine: float = 1 / 150, wide: float = 1 / 28) -> None:
        for argument, value in (("fine", fine), ("wide", wide)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise ValueError(f"edges: {argument} must be a share of the image's edge in (0, 1], got {value!r}.")
        self.device, self.fine, self.wide = default_device(device), float(fine), float(wide)
        self.fingerprint = f"edges 1 {self.fine} {self.wide}"

    def prompt_for(self, record: Record) -> str:
        """No text is needed for a folder."""
        return "edges"

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Edge strength.

        Args:
            images: float [B, C, H, W] in [0, 1]; channels are averaged.
            prompts: One text per image; not read.

        Returns:
            float32 [B, H, W] in [0, 1], on the images' device, 1 where the edges are strongest. An image without contrast gets an empty map.
        """
        check_images(images, prompts, self.name)
        maps = torch.zeros((len(images), *images.shape[2:]), device=images.device)
        for k in range(len(images)):  # one by one: a batched convolution may round by its batch
            maps[k] = self._score(images[k : k + 1].to(self.device, torch.float32).mean(1, keepdim=True)).to(images.device)
        return maps

    def _score(self, grey: Tensor) -> Tensor:
        """[1, 1, H, W] → [H, W]"""
        edge = (grey.shape[2] * grey.shape[3]) ** 0.5
        smooth = F.pad(_gaussian(grey, self.fine * edge), (1, 1, 1, 1), mode="replicate")
        slope = torch.hypot(smooth[:, :, 1:-1, 2:] - smooth[:, :, 1:-1, :-2], smooth[:, :, 2:, 1:-1] - smooth[:, :, :-2, 1:-1])
        slope = torch.where(slope > 1e-6, slope, 0)  # rounding of the filter on a flat image
        score = _gaussian(slope, self.wide * edge)[0, 0]
        top = score.amax()
        return torch.where(top > 0, score / top.clamp(min=1e-12), 0).clamp(0, 1)


def _gaussian(x: Tensor, sigma: float) -> Tensor:
    """Gaussian smoothing with the border's values outside. [B, 1, H, W]"""
    radius = max(1, round(3 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device, dtype=torch.float64) / max(sigma, 1e-3)) ** 2)
    weights = (weights / weights.sum()).to(x.dtype)
    x = F.conv2d(F.pad(x, (radius, radius, 0, 0), mode="replicate"), weights.view(1, 1, 1, -1))
    return F.conv2d(F.pad(x, (0, 0, radius, radius), mode="replicate"), weights.view(1, 1, -1, 1))
