"""A CLIP-like model of any library behind one face: texts to embeddings, and a vision tower that can be cut after a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mwm.localize.training import Training
from mwm.localize.vit_block import Block

OPEN_CLIP_CONFIG = "open_clip_config.json"
_AGREE = 1e-3  # relative; a tower that was taken apart wrongly is off by its own size


@dataclass
class Tower:
    """A CLIP-like model, its vision tower in pieces. Weights are frozen.

    Attributes:
        embed: Pixels [B, 3, *size] → tokens [B, T, D].
        blocks: The transformer, in order.
        tail: From the last block's tokens to the embedding: [N, T, D] → [N, E]; also [N, 1, D] where `one_token`.
        one_token: Whether the tail reads nothing but the first token.
        leading: Tokens before those of the patches.
        grid: Rows and columns of patches.
        size: Input height and width, pixels.
        mean: Subtracted from images in [0, 1]. float32 [3, 1, 1]
        std: Divided by. float32 [3, 1, 1]
        resample: "bicubic" or "bilinear".
        encode: Texts → embeddings [P, E]; refuses texts that are too long.
        whole: The library's own image embedding, pixels → [B, E]; `check` compares with it.
        kind: Class of the model, for messages.
        device: Where it runs.
        fingerprint: Changes with the weights.
        training: What the model learnt from in `mwm localize train`, or None.
        logit_scale: Factor by which the model was trained to multiply cosines.
    """

    embed: Callable[[Tensor], Tensor]
    blocks: list[Block]
    tail: Callable[[Tensor], Tensor]
    one_token: bool
    leading: int
    grid: tuple[int, int]
    size: tuple[int, int]
    mean: Tensor
    std: Tensor
    resample: str
    encode: Callable[[list[str]], Tensor]
    whole: Callable[[Tensor], Tensor]
    kind: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    fingerprint: str = ""
    training: Training | None = None
    logit_scale: float = 100.0
    _texts: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def preprocess(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the model wants them. Stretched to its size, not cropped, so that a map covers the whole image.

        Args:
            images: float [B, C, H, W]; other numbers of channels than 1 and 3 are averaged.

        Returns:
            float32 [B, 3, *size]
        """
        x = images.to(self.device, torch.float32)
        if x.shape[1] not in (1, 3):
            x = x.mean(1, keepdim=True)
        if tuple(x.shape[2:]) != self.size:
            # Processors resize 8-bit images, which stay within their range; bicubic overshoot is cut likewise.
            x = F.interpolate(x, self.size, mode=self.resample, align_corners=False, antialias=True).clamp(0, 1)
        return (x.expand(-1, 3, -1, -1) - self.mean) / self.std

    @torch.no_grad()
    def prefix(self, pixels: Tensor, layer: int) -> Tensor:
        """Tokens after block `layer`. [B, 3, *size] → [B, T, D]"""
        x = self.embed(pixels)
        for block in self.blocks[: layer + 1]:
            x = block(x)
        return x

    def suffix(self, layer: int, dtype: torch.dtype = torch.float32, *, prepared: bool = False) -> Callable[[Tensor], Tensor]:
        """What follows block `layer`, as a function of its output: [N, T, D] → embedding float32 [N, E], differentiable.

        Args:
            layer: The block, 0-based, at most depth - 1.
            dtype: Precision of the blocks; the tail stays float32.
            prepared: Lay the weights out for many passes; costs two copies of them on the CPU.
        """
        blocks = [block if dtype == torch.float32 else block.to(dtype) for block in self.blocks[layer + 1 :]]
        if prepared:
            last = blocks[-1:] if self.one_token else []
            blocks = [*(block.prepared() for block in blocks[: len(blocks) - len(last)]), *last]

        def run(x: Tensor) -> Tensor:
            x = x.to(dtype)
            for block in blocks[:-1]:
                x = block(x)
            if blocks:
                x = blocks[-1].first_token(x) if self.one_token else blocks[-1](x)
            return self.tail(x.float())

        return run

    @torch.no_grad()
    def text(self, prompts: list[str]) -> Tensor:
        """Unit embeddings of prompts; each is computed once. A prompt may hold several wordings between bars ("lung | both lungs"), which are averaged.

        Returns:
            float32 [len(prompts), E]

        Raises:
            ValueError: a wording is empty, or longer than the model reads.
        """
        for prompt in prompts:
            if prompt in self._texts:
                continue
            wordings = [wording.strip() for wording in prompt.split("|")]
            if not all(wordings):
                raise ValueError(f"localize: wordings between bars must not be empty, got {prompt!r}. Write 'lung | both lungs'.")
            self._texts[prompt] = F.normalize(F.normalize(self.encode(wordings).float(), dim=-1).mean(0), dim=0)
        return torch.stack([self._texts[prompt] for prompt in prompts]) if prompts else torch.zeros(0, 1, device=self.device)

    def patches(self, x: Tensor) -> Tensor:
        """Values per token as maps on the grid of patches. [B, T] → [B, *grid]"""
        return x[:, self.leading :].reshape(len(x), *self.grid)

    @torch.no_grad()
    def check(self, name: str) -> None:
        """Compare the pieces with the library's own embedding, on one random image.

        Raises:
            ValueError: they disagree; the tower has parts that this version does not know.
        """
        pixels = torch.randn(1, 3, *self.size, generator=torch.Generator().manual_seed(0)).to(self.device)
        ours, theirs = self.suffix(-1)(self.embed(pixels)), self.whole(pixels)
        off = float((ours - theirs).norm() / theirs.norm())
        if not off <= _AGREE:
            raise ValueError(f"{name}: the vision tower must be a plain pre-norm transformer, got a {self.kind} whose parts do not add up to its own embedding "
                             f"(off by {off:.1e}). Take another checkpoint.")


def logit_scale(model: nn.Module, usual: float = 100.0) -> float:
    """exp of a model's learned temperature, which CLIP-like models keep as `logit_scale`; the usual one where there is none, or no finite one."""
    stored = getattr(model, "logit_scale", None)
    scale = float(stored.detach().float().exp().flatten()[0]) if isinstance(stored, Tensor) and stored.numel() else usual
    return scale if 0 < scale < float("inf") else usual
