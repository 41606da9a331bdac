"""The whole pre-training step, masks included, forward and backward, against the authors' step with the same weights.

ResNet-50 with decoder width 768, 224 px, regions that cover half of the image, 80 % hidden inside and 40 % outside, 60 % over all.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from functools import partial

import timm
import torch
from mwm.bench.authors_step import AuthorsModel, draw_masks, nearest_grid
from mwm.bench.bars import SHIPPED
from mwm.bench.encoders import random_active, waken
from mwm.bench.harness import Case, Check, Match, Step, joint_difference, timed
from mwm.bench.settings import Settings
from torch import Tensor

import mwm

AUTHORS_BF16 = "authors' step, bfloat16 autocast"
HIGH, LOW = 0.8, 0.4

LOSS, GRADIENTS = 1e-4, 1e-2
"""Largest relative difference of the losses and of all gradients as one vector, float32; in bfloat16 the losses differ by at most 2 %."""


def random_regions(batch: int, size: int) -> Tensor:
    """A box of half the image's area at a random place in each image. float [B, H, W]"""
    left = torch.randint(0, size // 2 + 1, (batch,), generator=torch.Generator().manual_seed(2))
    column = torch.arange(size)
    inside = (column >= left[:, None]) & (column < left[:, None] + size // 2)
    return inside[:, None, :].expand(batch, size, size).float().contiguous()


class StepSides:
    """Both steps from the same weights; `decode` is handed to our model where it is not None."""

    def __init__(self, name: str, *, width: int = 768, batch: int = 8, size: int = 224, patch: int = 32, decode: str | None = None,
                 device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.device = device
        indices = (1, 2, 3, 4)
        net = waken(timm.create_model(name, features_only=True, out_indices=indices).train())
        options = {} if decode is None else {"decode": decode}
        self.ours = mwm.MaskedImageModel(mwm.sparsify(copy.deepcopy(net)), patch, decoder_width=width, **options).to(device).train()
        self.authors = AuthorsModel(net, self.ours).to(device).train()
        self.images = torch.randn(batch, 3, size, size).to(device)
        self.images_last = self.images.to(memory_format=torch.channels_last)
        self.grid = (size // patch, size // patch)
        self.regions = random_regions(batch, size)
        self.policy = mwm.create_policy("region", high=HIGH, low=LOW, empty="low")
        self.ids = torch.arange(batch)
        self.epoch = 0

    def our_step(self, *, bf16: bool) -> Step:
        """Regions to masks to loss to gradients."""

        def step() -> None:
            self.epoch += 1
            active = self.policy(self.regions, grid=self.grid, seed=0, ids=self.ids, epoch=self.epoch)
            with self._autocast(bf16):
                loss = self.ours(self.images_last, active)
            loss.backward()

        return step

    def authors_step(self, *, bf16: bool) -> Step:
        """The same, as the authors do it."""

        def step() -> None:
            active = draw_masks(nearest_grid(self.regions, self.grid), HIGH, LOW).view(len(self.images), *self.grid).to(self.device)
            with self._autocast(bf16):
                loss = self.authors(self.images, active)
            loss.backward()

        return step

    def _autocast(self, bf16: bool) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device, torch.bfloat16) if bf16 else contextlib.nullcontext()

    def check(self, *, ours_bf16: bool, authors_bf16: bool, loose: bool = False) -> Check:
        """The same two images and masks to both: losses and, in float32, gradients; `loose`: as for bfloat16, where a side may use TF32."""
        few = min(2, len(self.images))
        active = random_active(few, self.grid, 0.6, seed=5)[0].to(self.device)
        losses, gradients = [], []
        for model, images, bf16 in ((self.ours, self.images_last, ours_bf16), (self.authors, self.images, authors_bf16)):
            with self._autocast(bf16):
                loss = model(images[:few], active)
            loss.backward()
            losses.append(float(loss.detach()))
            gradients.append(_encoder_gradients(model))
            model.zero_grad(set_to_none=True)
        difference = abs(losses[0] - losses[1]) / abs(losses[1])
        if ours_bf16 or authors_bf16 or loose:
            return Check(difference, 2e-2)
        # One figure for both: the gradients' difference is brought to the loss's scale.
        return Check(max(difference, joint_difference(*gradients) * LOSS / GRADIENTS), LOSS)


def _encoder_gradients(model: torch.nn.Module) -> list[Tensor]:
    """Gradients of the encoder and decoder blocks, which both models hold in the same order."""
    encoder = model.net if hasattr(model, "net") else model.encoder
    decoder = model.decoder if hasattr(model, "decoder") else torch.nn.ModuleList([model.blocks, model.pixels])
    return [p.grad for part in (encoder, decoder) for p in part.parameters() if p.grad is not None]


def offers_hidden_decoding() -> bool:
    """Whether this version's model can decode the hidden patches only."""
    return "decode" in inspect.signature(mwm.MaskedImageModel).parameters


@functools.lru_cache(maxsize=1)
def _sides(name: str, decode: str | None, sizes: tuple[tuple[str, int], ...]) -> StepSides:
    return StepSides(name, decode=decode, **dict(sizes))


def prepare(name: str, *, ours_bf16: bool, authors_bf16: bool, decode: str | None = None, **sizes: int) -> Match:
    """Both steps and whether they agree.

    Decoding hidden patches only gives another function (norm statistics, context), so there the exact step of the same
    kernels is what is checked.
    """
    sides = _sides(name, decode, tuple(sorted(sizes.items())))
    rival = AUTHORS_BF16 if authors_bf16 else SHIPPED
    checked = sides if decode is None else _exact(name, sizes)
    return Match(timed(sides.our_step(bf16=ours_bf16)), {rival: timed(sides.authors_step(bf16=authors_bf16))},
                 {rival: checked.check(ours_bf16=ours_bf16, authors_bf16=authors_bf16)}, visible=0.4, warmup=1,
                 notes={"": "" if decode is None else f'decode="{decode}": not the exact step; the exact one of the same kernels was checked'})


def _exact(name: str, sizes: dict[str, int]) -> StepSides:
    return StepSides(name, **{**sizes, "batch": min(2, sizes.get("batch", 2))})


def cases(settings: Settings) -> list[Case]:
    """float32, bfloat16 against the authors' as shipped, bfloat16 on both sides; the same with hidden decoding where it exists."""
    kinds = [("ours fp32", False, False), ("ours bfloat16", True, False), ("bfloat16 on both sides", True, True)]
    found = []
    for decode in (None, *(["hidden"] if offers_hidden_decoding() else [])):
        for label, ours_bf16, authors_bf16 in kinds:
            name = label if decode is None else f'{label}, decode="{decode}"'
            options = dict(ours_bf16=ours_bf16, authors_bf16=authors_bf16, decode=decode)
            if settings.smoke:
                if not authors_bf16:
                    found.append(Case("step", f"smoke: {name}", partial(prepare, "resnet18", width=32, batch=2, size=64, **options), 1))
            else:
                found.append(Case("step", name, partial(prepare, "resnet50", batch=settings.batch or 8, **options), 3 if decode else 5,
                                  extra=authors_bf16 or decode is not None))
    return found
