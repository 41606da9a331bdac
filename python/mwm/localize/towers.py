"""CLIP-like models of any library behind one face: texts to embeddings, and a vision tower that can be cut after a block.

`load_tower` reads `CLIPModel`, `SiglipModel` and `VisionTextDualEncoderModel` of transformers, and models of open_clip, from a local folder or by hub name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mwm.localize.checkpoints import content_hash, hub_answers, local_folder
from mwm.localize.protocol import default_device
from mwm.localize.vit_block import Block

OPEN_CLIP_CONFIG = "open_clip_config.json"
_EXAMPLE = "openai/clip-vit-base-patch16"
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


def load_tower(checkpoint: str | Path, device: Any = None, *, name: str = "bottleneck", offline: bool = False, trust_remote_code: bool = False,
               revision: str | None = None) -> Tower:
    """Read a CLIP-like model.

    Weights are read from safetensors; of open_clip models also from .bin files, as bare tensors, since BiomedCLIP comes in no other form.

    Args:
        checkpoint: A folder that `save_pretrained` wrote, or one with open_clip_config.json and weights, or a hub name. "hf-hub:owner/model" is an open_clip model.
        device: Where it runs; the first CUDA device where there is one, else the CPU.
        name: The localizer, for messages.
        offline: Use only what is on disk.
        trust_remote_code: Let transformers run code that comes with the checkpoint.
        revision: Commit, branch or tag of a hub name.

    Raises:
        ValueError: the checkpoint is no such model, is not there, or cannot be fetched; open_clip is needed and not installed.
    """
    place = default_device(device)
    text = str(checkpoint)
    folder = local_folder(text.removeprefix("hf-hub:"), name, _EXAMPLE, ("config.json", OPEN_CLIP_CONFIG))
    source = str(folder) if folder else text.removeprefix("hf-hub:")
    local_only = offline or folder is not None or not hub_answers()
    if text.startswith("hf-hub:") or _is_open_clip(folder, source, local_only, revision):
        from mwm.localize.towers_open_clip import read
    else:
        from mwm.localize.towers_transformers import read
    tower, commit = read(source, name=name, device=place, local_only=local_only, trust_remote_code=trust_remote_code, revision=revision)
    tower.device, tower.mean, tower.std = place, tower.mean.to(place), tower.std.to(place)
    tower.fingerprint = content_hash(folder) if folder else f"{source}@{commit}"
    tower.check(name)
    return tower


def _is_open_clip(folder: Path | None, source: str, local_only: bool, revision: str | None) -> bool:
    """Whether a checkpoint is one of open_clip's; a hub model may be both, and then transformers reads it."""
    if folder is not None:
        return (folder / OPEN_CLIP_CONFIG).is_file() and not (folder / "model.safetensors").is_file()
    from huggingface_hub import file_exists, try_to_load_from_cache

    if local_only:
        return isinstance(try_to_load_from_cache(source, OPEN_CLIP_CONFIG, revision=revision), str)
    try:
        return file_exists(source, OPEN_CLIP_CONFIG, revision=revision) and not file_exists(source, "model.safetensors", revision=revision)
    except Exception:  # whatever is wrong, the reader that follows says it in its own words
        return False
