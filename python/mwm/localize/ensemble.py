"""Several prompts for one region: the mean of their maps, less the maps of what is not wanted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mwm.localize.protocol import Localizer, UnsupportedImage, check_images
from mwm.localize.training import Training


class EnsembleLocalizer:
    """A localizer whose map is clamp(mean of the prompts' maps - weight * mean of the negative prompts' maps, 0, 1).

    The difference is not stretched to [0, 1] again: where prompt and negative prompt give the same map nothing is left, and an empty region says so.

    Args:
        localizer: What makes the maps of single prompts.
        prompts: Asked for every image instead of the text that a call names; empty to ask what the call names.
        negatives: Their maps are subtracted.
        weight: Factor of the subtracted map.

    Raises:
        ValueError: there is neither a prompt nor a negative one, one is empty, or the localizer reads no text.
    """

    def __init__(self, localizer: Localizer, prompts: Sequence[str] = (), negatives: Sequence[str] = (), weight: float = 1.0) -> None:
        for text in (*prompts, *negatives):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"ensemble: prompts must be texts, got {text!r}.")
        if not prompts and not negatives:
            raise ValueError("ensemble: prompts or negatives must be given, got neither. Use the localizer itself.")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= 10:
            raise ValueError(f"ensemble: weight must be in (0, 10], got {weight!r}.")
        if hasattr(localizer, "prompt_for"):
            raise ValueError(f"ensemble: localizer must read prompts, got {localizer.name}, which does not. Leave --not and --prompt-set out.")
        self.inner, self.prompts, self.negatives, self.weight = localizer, tuple(prompts), tuple(negatives), float(weight)
        self.name = localizer.name
        self.similarity: Tensor | None = None
        self.gives_regions = False  # a mean of regions is a map

    @property
    def fingerprint(self) -> str:
        """That of the localizer inside, with the texts."""
        texts = json.dumps([self.prompts, self.negatives, self.weight]).encode()
        return f"{self.inner.fingerprint} ensemble {hashlib.blake2b(texts, digest_size=8).hexdigest()}"

    @property
    def map_grid(self) -> tuple[int, int] | None:
        """Rows and columns of the maps of the localizer inside, where it tells them."""
        return getattr(self.inner, "map_grid", None)

    @property
    def training(self) -> Training | None:
        """What the localizer inside learnt from, where it is one that was trained."""
        return getattr(self.inner, "training", None)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The combined maps; see `Localizer`. `similarity` holds the mean cosine with the prompts afterwards, where the localizer tells it."""
        check_images(images, prompts, self.name)
        if not len(images):
            return images.new_zeros((0, *images.shape[2:]), dtype=torch.float32)
        if self.prompts:  # first: an image that is refused for what is wanted is refused
            heat, self.similarity = mean_map(self.inner, images, self.prompts)
        else:
            heat = self.inner(images, prompts)
            self.similarity = getattr(self.inner, "similarity", None)
        if self.negatives:
            heat = heat - self.weight * torch.stack([self._unwanted(images, text) for text in self.negatives]).mean(0)
        return heat.clamp(0, 1)

    def _unwanted(self, images: Tensor, text: str) -> Tensor:
        """The map of a negative prompt. Where the localizer refuses an image for it (nothing there is like the text) nothing is subtracted. float32 [B, H, W]"""
        try:
            return self.inner(images, [text] * len(images))
        except UnsupportedImage:
            if len(images) == 1:
                return images.new_zeros((1, *images.shape[2:]), dtype=torch.float32)
            return torch.cat([self._unwanted(image, text) for image in images.split(1)])


def mean_map(localizer: Localizer, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Mean over prompts of the maps of every image. float32 [B, H, W], and mean similarities [B] where the localizer tells them"""
    maps, similarity = maps_of(localizer, images, prompts)
    return maps.mean(0), None if similarity is None else similarity.mean(0)


def maps_of(localizer: Localizer, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """Maps of every prompt on every image, at once where the localizer has `many`.

    Args:
        localizer: Any localizer.
        images: float [B, C, H, W] in [0, 1]
        prompts: P texts.

    Returns:
        float32 [P, B, H, W], and similarities [P, B] or None.
    """
    many: Any = getattr(localizer, "many", None)
    if many is not None:
        maps = many(images, list(prompts))
        told = getattr(localizer, "similarity", None)
        return maps, told.reshape(maps.shape[:2]) if told is not None and told.numel() == len(maps) * len(images) else None
    maps, similarity = [], []
    for prompt in prompts:
        maps.append(localizer(images, [prompt] * len(images)))
        similarity.append(getattr(localizer, "similarity", None))
    return torch.stack(maps), torch.stack(list(similarity)) if all(s is not None for s in similarity) else None
