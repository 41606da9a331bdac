"""`bottleneck`: which patches a CLIP-like model needs to see its text in the image, by M2IB (arXiv 2312.17174), many images at once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mwm.localize.capacity import COSINE_EPS, Schedule, capacity, optimise
from mwm.localize.presets import pinned
from mwm.localize.protocol import UnsupportedImage, check_flag, check_images, check_whole
from mwm.localize.towers import load_tower

SETTINGS: dict[str, dict[str, Any]] = {
    # Ten forward passes of ten copies in the authors' code; the tenth only reads the capacity, which needs no pass.
    "faithful": {"copies": (10,) * 9, "antithetic": False},
    # While α is large there is little noise, so one copy does; later two of opposite sign. Five larger updates go as far as nine (scripts/compare_bottleneck.py).
    "fast": {"copies": (1, 1, 2, 2, 2), "antithetic": True, "lr": 9 / 5},
}
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FLAT = 1e-6  # range of grey values, or of saliency against its size, below which there is nothing to show


@dataclass(frozen=True)
class Explained:
    """What `BottleneckLocalizer.explain` found.

    Attributes:
        maps: float32 [B, H, W] in [0, 1]
        cosine: Similarity of each image with its prompt, without noise. float32 [B]
    """

    maps: Tensor
    cosine: Tensor


class BottleneckLocalizer:
    """Text-guided saliency of CLIP-like models.

    After block `layer` of the vision tower every element of every token is mixed with noise, as much as the cosine with the text allows; the map is what information is left
    in each patch, from the least to the most in the image. An image always has such a least and most: whether the text fits it at all is told by the cosine, not by the map.

    The text and the blocks up to `layer` are computed once, and only what follows is differentiated, in the activations. Noise is drawn from the seed and the image's own pixels:
    a map depends neither on the batch nor on the order of images, and prompts of one image are compared under the same noise. CPU and CUDA draw different numbers.

    Args:
        checkpoint: Name of a preset (`mwm localize --list`), a hub name, or a local folder.
        device: Where it runs.
        setting: "faithful" (the authors' procedure) or "fast".
        layer: Block after which noise is mixed in, 0-based; None for the preset's, or two thirds of the depth.
        beta: Price of information; larger means smaller regions. None for the preset's, or 0.1.
        sigma: Standard deviation of noise and prior.
        seed: Of the noise.
        min_similarity: Refuse images whose cosine with the prompt is lower; with a prompt set, with any of its sentences.
        precision: "fp32", or "bf16" for the blocks that are run repeatedly.
        copies: Noisy copies per step, or one number for each step but the last; instead of the setting's.
        steps: Steps, of which the last only reads the result; with a single number of `copies`.
        in_flight: Copies that go through the network at once, over all images; None for 10 on the CPU (2000 rows, see bench/NOTES.md), 256 elsewhere.
        revision: Commit, branch or tag of a hub name; None for the preset's, else the newest.
        offline: Use only what is on disk.
        trust_remote_code: Let transformers run code that comes with the checkpoint.

    Attributes:
        training: What the checkpoint learnt from in `mwm localize train`, or None.
        map_grid: Rows and columns of a map before it is brought to the image's size.
        similarity: Cosines of the last call's images and prompts, without noise. float32 [B], after `many` [P, B]; None before the first.
        seed: May be set to another number, for another draw of the noise.

    Raises:
        ValueError: a setting or the checkpoint does not fit. From a call: a prompt is too long, or a map is not finite; `UnsupportedImage`: an image is not similar enough.
    """

    name = "bottleneck"
    checkpoint_hint = "Give a preset such as biomedclip (mwm localize --list), a hub name, or a local folder."

    def __init__(self, checkpoint: str | Path, device: Any = None, *, setting: str = "faithful", layer: int | None = None, beta: float | None = None, sigma: float = 1.0,
                 seed: int = 0, min_similarity: float | None = None, precision: str = "fp32", copies: int | Sequence[int] | None = None, steps: int | None = None,
                 in_flight: int | None = None, revision: str | None = None, offline: bool = False, trust_remote_code: bool = False) -> None:
        source, revision, known = pinned(checkpoint, self.name, revision)
        self.seed, self.min_similarity, self.precision, self.setting = seed, min_similarity, precision, setting
        chosen = known.beta if beta is None and known else beta
        self.schedule = _schedule(setting, copies, steps, 0.1 if chosen is None else chosen, sigma)
        check_whole(seed, "seed", self.name, least=0)
        for argument, flag in (("offline", offline), ("trust_remote_code", trust_remote_code)):
            check_flag(flag, argument, self.name)
        if min_similarity is not None and (isinstance(min_similarity, bool) or not isinstance(min_similarity, (int, float)) or not -1 <= min_similarity <= 1):
            raise ValueError(f"bottleneck: min_similarity must be a cosine in [-1, 1], got {min_similarity!r}.")
        if precision not in _PRECISIONS:
            raise ValueError(f"bottleneck: precision must be fp32 or bf16, got {precision!r}.")
        if in_flight is not None:
            check_whole(in_flight, "in_flight", self.name)
        self.tower = load_tower(source, device, name=self.name, offline=offline, trust_remote_code=trust_remote_code, revision=revision)
        self.training, self.map_grid = self.tower.training, self.tower.grid
        self.layer = which_layer(layer, known.layer if known else None, self.tower.depth, self.name)
        self.in_flight = in_flight or (10 if self.tower.device.type == "cpu" else 256)
        self._suffix = self.tower.suffix(self.layer, _PRECISIONS[precision], prepared=True)
        self._clean = self._suffix if precision == "fp32" else self.tower.suffix(self.layer)
        self.similarity: Tensor | None = None
        self._cosines: list[float] = []

    @property
    def fingerprint(self) -> str:
        """Changes with the weights and whatever else changes a map."""
        s = self.schedule
        return f"bottleneck 1 {self.tower.fingerprint} {self.layer} {list(s.copies)} {s.antithetic} {s.lr} {s.beta} {s.sigma} {self.seed} {self.precision} {self.min_similarity}"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Maps of what the prompts name; see `Localizer`. An image of one colour gets an empty map."""
        return self.explain(images, prompts).maps

    @torch.no_grad()
    def explain(self, images: Tensor, prompts: list[str]) -> Explained:
        """Maps, and how well image and prompt match.

        Args:
            images: float [B, C, H, W] in [0, 1]
            prompts: One text per image.
        """
        check_images(images, prompts, self.name)
        if not len(images):
            return Explained(images.new_zeros((0, *images.shape[2:]), dtype=torch.float32), torch.zeros(0))
        text = self.tower.text(list(prompts))
        return self._explain(images, self._tokens(images), text, prompts)

    @torch.no_grad()
    def many(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The maps of every prompt on every image; what does not depend on the prompt is computed once. [B, C, H, W], P prompts → float32 [P, B, H, W]"""
        for prompt in prompts:
            check_images(images, [prompt] * len(images), self.name)
        if not len(images) or not prompts:
            return images.new_zeros((len(prompts), len(images), *images.shape[2:]), dtype=torch.float32)
        text, h = self.tower.text(list(prompts)), self._tokens(images)
        found = [self._explain(images, h, text[k : k + 1].expand(len(images), -1), [prompt] * len(images)) for k, prompt in enumerate(prompts)]
        self.similarity = torch.stack([one.cosine for one in found])
        return torch.stack([one.maps for one in found])

    def _tokens(self, images: Tensor) -> Tensor:
        """What the bottleneck's block makes of the images. [B, T, D]"""
        pixels = self.tower.preprocess(images)
        return torch.cat([self.tower.prefix(pixels[k : k + self.in_flight], self.layer) for k in range(0, len(pixels), self.in_flight)])

    def _similarity(self, h: Tensor, text: Tensor) -> Tensor:
        """Cosines without noise. [B]"""
        return torch.cat([F.cosine_similarity(text[k : k + self.in_flight], self._clean(h[k : k + self.in_flight]), dim=-1, eps=COSINE_EPS)
                          for k in range(0, len(h), self.in_flight)])

    def _explain(self, images: Tensor, h: Tensor, text: Tensor, prompts: Sequence[str]) -> Explained:
        cosine = self._similarity(h, text)
        self._refuse(cosine, prompts)
        generators = [torch.Generator(h.device).manual_seed(image_seed(image, self.seed)) for image in images]
        alpha = optimise(h, text, self._suffix, self.schedule, lambda k, n: torch.randn((n, *h.shape[1:]), generator=generators[k], device=h.device), self.in_flight)
        saliency = self.tower.patches(capacity(h, alpha, self.schedule.sigma).sum(-1))
        self._cosines += cosine.tolist()
        self.similarity = cosine.to(images.device)
        return Explained(to_maps(saliency, images, self.name), self.similarity)

    @torch.no_grad()
    def cosine(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosine of each image with its prompt, without a map. float32 [B]"""
        check_images(images, prompts, self.name)
        return self._similarity(self._tokens(images), self.tower.text(list(prompts))).to(images.device) if len(images) else torch.zeros(0)

    def summary(self) -> str:
        """One line on the images that were mapped so far."""
        if not self._cosines:
            return ""
        found = torch.tensor(self._cosines)
        return f"similarity of image and prompt: mean {float(found.mean()):.3f}, {float(found.min()):.3f} … {float(found.max()):.3f} over {len(found)} images"

    def _refuse(self, cosine: Tensor, prompts: Sequence[str]) -> None:
        if self.min_similarity is None or bool((cosine >= self.min_similarity).all()):
            return
        k = int(cosine.argmin())
        raise UnsupportedImage(f"bottleneck: image and prompt must have a cosine of at least {self.min_similarity:g}, got {float(cosine[k]):.3f} for {prompts[k][:60]!r}. "
                               "Reword the prompt, or lower min_similarity.")


def image_seed(image: Tensor, seed: int) -> int:
    """Seed of an image's noise, from its pixels alone. [C, H, W] → [0, 2⁶³)"""
    bytes_ = image.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(bytes_, digest_size=8, key=str(seed).encode()).digest(), "little") >> 1


def which_layer(asked: int | None, known: int | None, depth: int, name: str) -> int:
    """The block to cut after: what was asked for, else the preset's, else two thirds of the depth.

    Raises:
        ValueError: there is no such block, or none behind it.
    """
    layer = asked if asked is not None else known if known is not None else max(0, depth * 2 // 3 - 1)
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= depth - 2:
        raise ValueError(f"{name}: layer must be in 0 … {depth - 2} for a tower of {depth} blocks, got {layer!r}.")
    return layer


def to_maps(saliency: Tensor, images: Tensor, name: str) -> Tensor:
    """Values on the patch grid as maps of the images' size, from the least (0) to the most (1) of each image.

    Args:
        saliency: float [B, h, w]
        images: [B, C, H, W]

    Returns:
        float32 [B, H, W], on the images' device; empty where the image has one colour or the map one value.

    Raises:
        ValueError: a value is not finite.
    """
    if not bool(torch.isfinite(saliency).all()):
        raise ValueError(f"{name}: the map must be finite, got NaN or infinite values. The weights may be damaged, or bf16 too coarse; try precision fp32.")
    maps = F.interpolate(saliency.float()[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    span = high - low
    flat = span <= _FLAT * torch.maximum(low.abs(), high.abs())
    grey = images.detach().to(maps.device, torch.float32).flatten(1)
    flat |= ((grey.amax(1) - grey.amin(1)) <= _FLAT)[:, None, None]
    return torch.where(flat, 0.0, (maps - low) / torch.where(flat, 1.0, span)).clamp(0, 1).to(images.device)


def _schedule(setting: str, copies: int | Sequence[int] | None, steps: int | None, beta: float, sigma: float) -> Schedule:
    if not isinstance(setting, str) or setting not in SETTINGS:
        raise ValueError(f"bottleneck: setting must be {' or '.join(SETTINGS)}, got {setting!r}.")
    for argument, value in (("beta", beta), ("sigma", sigma)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0 or value == float("inf"):
            raise ValueError(f"bottleneck: {argument} must be positive, got {value!r}.")
    options = dict(SETTINGS[setting])
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 2):
        raise ValueError(f"bottleneck: steps must be a whole number from 2 on, got {steps!r}.")
    if copies is None or isinstance(copies, int):
        each = tuple(options["copies"]) if copies is None else (copies,) * (len(options["copies"]) if steps is None else steps - 1)
        if copies is None and steps is not None:
            each = (*each, *each[-1:] * steps)[: steps - 1]
    else:
        each = tuple(copies)
        if steps is not None and len(each) != steps - 1:
            raise ValueError(f"bottleneck: copies must be one number per step but the last, got {len(each)} for {steps} steps.")
    if not each or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in each):
        raise ValueError(f"bottleneck: copies must be whole numbers from 1 on, got {copies!r}.")
    return Schedule(each, lr=float(options.get("lr", 1.0)), beta=float(beta), sigma=float(sigma), antithetic=bool(options["antithetic"]))
