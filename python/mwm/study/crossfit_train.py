"""Training of one small localizer on resident images: the network of `tiny` from scratch, with its prompt, on the masks of some patients."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mwm.localize.tiny_model import SIZE, TinyModel, prompt_ids, stretch

VERSION = 2  # raised when the same images give other maps


@dataclass(frozen=True)
class FitSettings:
    """How one localizer is trained.

    Attributes:
        steps: Optimizer steps.
        batch: Images of a step.
        lr: Largest learning rate of AdamW; linear warm-up, then cosine.
        weight_decay: Of AdamW.
        mirror: Whether half of the views are flipped left to right, and maps averaged with those of the mirror image. Off for prompts that tell sides.
    """

    steps: int = 600
    batch: int = 16
    lr: float = 2.5e-3
    weight_decay: float = 0.02
    mirror: bool = True


def view(images: Tensor, masks: Tensor, settings: FitSettings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random views of images and masks, all of a batch at once, on their device.

    Args:
        images: uint8 [B, SIZE, SIZE]
        masks: 0 … 255. uint8 [B, SIZE, SIZE]
        settings: Of which `mirror` is used.
        generator: Source of randomness, on the images' device.

    Returns:
        Images as the network takes them, float32 [B, 1, SIZE, SIZE] in [0, 1], and masks, float32 [B, SIZE, SIZE], 0 or 1.
    """
    n, device = len(images), images.device

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, device=device, generator=generator)

    angle, zoom, aspect = draw(-0.3, 0.3), draw(-0.25, 0.25).exp(), draw(-0.12, 0.12).exp()
    side = torch.where(draw(0, 1) < 0.5, -1.0, 1.0) if settings.mirror else torch.ones(n, device=device)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack([torch.stack([cos * aspect * side, -sin, draw(-0.12, 0.12)], 1),
                         torch.stack([sin * aspect * side, cos, draw(-0.12, 0.12)], 1)], 1)
    grid = F.affine_grid(theta, (n, 1, SIZE, SIZE), align_corners=False)
    both = torch.stack([images, masks], 1).float() / 255
    moved = F.grid_sample(both, grid, mode="bilinear", align_corners=False)
    x, y = moved[:, :1], (moved[:, 1] > 0.5).float()
    per_image = (n, 1, 1, 1)
    x = x.clamp(min=1e-4).pow(draw(-0.45, 0.45).exp().view(per_image))
    bias = F.interpolate(torch.randn(n, 1, 4, 4, device=device, generator=generator), (SIZE, SIZE), mode="bicubic", align_corners=True)
    x = x * (bias * draw(0, 0.25).view(per_image)).exp()
    x = torch.where(draw(0, 1).view(per_image) < 0.25, F.avg_pool2d(x, 3, 1, 1), x)
    x = x + torch.randn(x.shape, device=device, generator=generator) * draw(0, 0.4).pow(3).view(per_image)
    return stretch(x), y


def fit_localizer(images: Tensor, masks: Tensor, prompt: str, settings: FitSettings, seed: int) -> TinyModel:
    """Train one localizer.

    Loss: 3 · binary cross-entropy + soft Dice, as `tiny` was trained; AdamW; the weights are averaged over the steps (decay up to 0.99).

    Args:
        images: As `standard_images` makes them, on the device that computes. uint8 [N, SIZE, SIZE]
        masks: 0 … 255. uint8 [N, SIZE, SIZE]
        prompt: A prompt of `tiny`'s vocabulary.
        settings: How.
        seed: Of weights, order and views.

    Returns:
        The averaged network in eval mode. Equal arguments give equal weights on one machine.
    """
    device = images.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TinyModel()
    model = model.to(device, memory_format=torch.channels_last).train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    order, generator = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)
    rows = _order(len(images), settings, order).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=device.type == "cuda")
    warm = max(1, min(60, settings.steps // 10))
    ids = prompt_ids([prompt]).to(device)
    ours, theirs = (_floats(net) for net in (average, model))
    half = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # a GPU waits for launches here, and casts are launches
    for step in range(settings.steps):
        done = step / settings.steps
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * done)) + 0.003)
        picked = rows[step]
        x, y = view(images[picked], masks[picked], settings, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits, _ = model(x.contiguous(memory_format=torch.channels_last), ids)
        loss = _loss(logits[:, 0].float(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(ours, theirs, 1 - min(0.99, (step + 1) / (step + 10)))
    return average


@torch.no_grad()
def heat_maps(model: TinyModel, images: Tensor, prompt: str, settings: FitSettings, batch: int = 64) -> Tensor:
    """Probability of each pixel to belong to what the prompt names. uint8 [N, SIZE, SIZE] → float32 [N, SIZE, SIZE] in [0, 1]"""
    ids = prompt_ids([prompt]).to(images.device)
    found = []
    for part in images.split(batch):
        x = stretch(part[:, None].float() / 255).contiguous(memory_format=torch.channels_last)
        logits = model(x, ids)[0][:, 0]
        if settings.mirror:
            logits = (logits + model(x.flip(3), ids)[0][:, 0].flip(2)) / 2
        found.append(torch.sigmoid(logits.float()))
    return torch.cat(found) if found else images.new_zeros((0, SIZE, SIZE), dtype=torch.float32)


def standard_image(image: Tensor) -> Tensor:
    """An image as the network's resident copy: grey, stretched, SIZE x SIZE. float [C, H, W] in [0, 1] → uint8 [SIZE, SIZE]"""
    grey = F.interpolate(image.float().mean(0)[None, None], (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
    return (stretch(grey)[0, 0] * 255).round().to(torch.uint8)


def standard_mask(mask: Tensor) -> Tensor:
    """A mask at the network's size. float [H, W] in [0, 1] → uint8 [SIZE, SIZE]"""
    small = F.interpolate(mask.float()[None, None], (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
    return (small[0, 0].clamp(0, 1) * 255).round().to(torch.uint8)


def _order(count: int, settings: FitSettings, generator: torch.Generator) -> Tensor:
    """Rows of every step: one shuffled pass over the images after another. int64 [steps, batch]"""
    wanted = settings.steps * settings.batch
    passes = [torch.randperm(count, generator=generator) for _ in range(-(-wanted // count))]
    return torch.cat(passes)[:wanted].view(settings.steps, settings.batch)


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    """3 · cross-entropy + soft Dice of each image. float32 [B, SIZE, SIZE] twice → []"""
    chance = torch.sigmoid(logits)
    overlap, sizes = (chance * target).sum((1, 2)), chance.sum((1, 2)) + target.sum((1, 2))
    return 3 * F.binary_cross_entropy_with_logits(logits, target) + (1 - (2 * overlap + 5) / (sizes + 5)).mean()


def _floats(model: TinyModel) -> list[Tensor]:
    return [value for value in model.state_dict().values() if value.is_floating_point()]
