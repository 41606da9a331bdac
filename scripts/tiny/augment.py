"""Augmentation of a batch of scans with their label maps, and images that are no scan. A left-right flip swaps the words' sides."""

from __future__ import annotations

import numpy as np
import torch
from prepare import BACKGROUND, LEFT, RIGHT
from torch import Tensor
from torch.nn import functional as F

from mwm.localize.tiny_model import SIZE, stretch


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """float32 [n, 1, 1, 1] in [low, high)"""
    return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)


def smooth_noise(n: int, cells: int, generator: torch.Generator, channels: int = 1) -> Tensor:
    """Smooth random fields of about unit variance. float32 [n, channels, SIZE, SIZE]"""
    noise = torch.randn(n, channels, cells, cells, generator=generator)
    return F.interpolate(noise, (SIZE, SIZE), mode="bicubic", align_corners=True)


def sampling_grid(n: int, flip: Tensor, generator: torch.Generator) -> Tensor:
    """Random crop, zoom, aspect, rotation, shear, shift and a smooth bend. -> [n, SIZE, SIZE, 2]"""
    u = lambda low, high: uniform(n, low, high, generator).flatten()  # noqa: E731
    angle = torch.deg2rad(u(-1, 1).pow(3) * 25 + u(-6, 6))
    zoom = torch.exp(u(-0.38, 0.38))
    aspect = torch.exp(u(-0.2, 0.2))
    scale_x, scale_y = zoom * aspect * (1 - 2 * flip.float()), zoom / aspect
    shear = u(-0.1, 0.1)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([torch.stack([cos * scale_x, (-sin + shear) * scale_y, u(-0.18, 0.18)], 1),
                         torch.stack([sin * scale_x, cos * scale_y, u(-0.18, 0.18)], 1)], 1)
    still = uniform(n, 0, 1, generator) < 0.1
    straight = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]).repeat(n, 1, 1)
    straight[:, 0, 0] -= 2 * flip.float()
    theta = torch.where(still[:, :, 0], straight, theta)
    grid = F.affine_grid(theta, (n, 1, SIZE, SIZE), align_corners=False)
    bend = smooth_noise(n, 5, generator, 2).permute(0, 2, 3, 1) * uniform(n, 0, 0.035, generator)
    return grid + bend


def curve(x: Tensor, generator: torch.Generator, *, monotone: bool) -> Tensor:
    """Random piecewise linear intensity curve per image. [n, 1, H, W] in [0, 1]"""
    n = len(x)
    steps = torch.rand(n, 6, generator=generator) + 0.05
    knots = steps.cumsum(1) / steps.sum(1, keepdim=True) if monotone else torch.rand(n, 6, generator=generator)
    knots = torch.cat([torch.zeros(n, 1), knots], 1)
    position = (x.flatten(1) * 6).clamp(0, 5.9999)
    index = position.long()
    low, high = knots.gather(1, index), knots.gather(1, index + 1)
    return (low + (high - low) * (position - index)).view_as(x)


def lung_window(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """CT slices as a lung window would show them: bright tissue, grey lungs with vessels, dark outside. [n, 1, H, W]"""
    n = len(images)
    lungs = ((labels == LEFT) | (labels == RIGHT)).float()
    near = F.interpolate(F.max_pool2d(F.avg_pool2d(lungs, 8), 5, 1, 2), (SIZE, SIZE), mode="bilinear")
    tissue = F.max_pool2d(F.avg_pool2d((images > 0.06).float(), 7, 1, 3), 5, 1, 2)
    body = torch.maximum((tissue > 0.1).float(), (near > 0.3).float())
    vessels = (smooth_noise(n, 40, generator) > 1.2).float() * uniform(n, 0.2, 0.6, generator)
    lung = uniform(n, 0.05, 0.4, generator) + vessels + 0.05 * torch.randn(images.shape, generator=generator)
    flesh = uniform(n, 0.65, 0.95, generator) + 0.25 * images
    outside = uniform(n, 0, 0.1, generator)
    return (lungs * lung + (1 - lungs) * (body * flesh + (1 - body) * outside)).clamp(0, 1)


def intensities(x: Tensor, modality: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast, gamma, curves, bias field, blur, noise, markers; then the stretch that inference applies. [n, 1, H, W]"""
    n = len(x)
    chance = lambda p: uniform(n, 0, 1, generator) < p  # noqa: E731
    is_ct = (modality == 2)[:, None, None, None]
    windowed = torch.nonzero((is_ct & chance(0.35)).flatten()).flatten()
    if len(windowed):
        x = x.index_copy(0, windowed, lung_window(x[windowed], labels[windowed], generator))
    x = torch.where(chance(0.35), curve(x, generator, monotone=True), x)
    x = torch.where(chance(0.12) & ~is_ct, curve(x, generator, monotone=False), x)
    x = x.clamp(min=0).pow(torch.exp(uniform(n, -0.55, 0.55, generator)))
    bias = torch.exp(smooth_noise(n, 3, generator) * uniform(n, 0, 0.25, generator))
    x = x * torch.where(chance(0.6), bias, torch.ones(()))
    x = torch.where(chance(0.25), F.avg_pool2d(x, 3, 1, 1), x)
    low = F.interpolate(F.interpolate(x, scale_factor=0.5, mode="bilinear"), (SIZE, SIZE), mode="bilinear")
    x = torch.where(chance(0.15), low, x)
    x = x + torch.randn(x.shape, generator=generator) * uniform(n, 0, 1, generator).pow(3) * 0.08
    x = x * uniform(n, 0.75, 1.25, generator) + uniform(n, -0.1, 0.1, generator) * chance(0.4)
    for k in torch.nonzero(chance(0.15).flatten()).flatten().tolist():  # markers, letters, tape
        row, column = torch.randint(0, SIZE - 16, (2,), generator=generator).tolist()
        height, width = torch.randint(4, 14, (2,), generator=generator).tolist()
        x[k, :, row : row + height, column : column + width] = float(x[k].max())
    return stretch(x)


def augment(images: Tensor, labels: Tensor, modality: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random views of scans.

    Args:
        images: uint8 [n, SIDE, SIDE]
        labels: Label maps. uint8 [n, SIDE, SIDE]
        modality: int64 [n]
        generator: Source of randomness.

    Returns:
        Images float32 [n, 1, SIZE, SIZE] and label maps uint8 [n, SIZE, SIZE]. Where an image was flipped, LEFT and RIGHT are swapped:
        the lung at image right stays the patient's left.
    """
    n = len(images)
    flip = torch.rand(n, generator=generator) < torch.where(modality == 0, 0.5, 0.25)
    grid = sampling_grid(n, flip, generator)
    x = F.grid_sample(images[:, None].float() / 255, grid, mode="bilinear", align_corners=False)
    y = F.grid_sample(labels[:, None].float(), grid, mode="nearest", align_corners=False).round().to(torch.uint8)
    swapped = y.clone()
    swapped[y == LEFT] = RIGHT
    swapped[y == RIGHT] = LEFT
    y = torch.where(flip[:, None, None, None], swapped, y)
    return intensities(x, modality, y, generator), y[:, 0]


def plain(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The view that inference sees. uint8 [n, SIDE, SIDE] twice -> float32 [n, 1, SIZE, SIZE], uint8 [n, SIZE, SIZE]"""
    x = F.interpolate(images[:, None].float() / 255, (SIZE, SIZE), mode="bilinear", antialias=True)
    y = F.interpolate(labels[:, None].float(), (SIZE, SIZE), mode="nearest").to(torch.uint8)
    return stretch(x), y[:, 0]


def not_a_scan(n: int, photos: list[np.ndarray], scans: Tensor, generator: torch.Generator) -> Tensor:
    """Images of no known modality: crops of photographs, noise, shapes, ultrasound-like sectors, shuffled scans. -> [n, 1, SIZE, SIZE]"""
    out = torch.zeros(n, 1, SIZE, SIZE)
    axis = torch.linspace(-1, 1, SIZE)
    for k in range(n):
        pick = int(torch.randint(0, 12, (1,), generator=generator))
        noise = smooth_noise(1, int(torch.randint(3, 60, (1,), generator=generator)), generator)[0]
        if pick < 5 and photos:
            photo = photos[int(torch.randint(0, len(photos), (1,), generator=generator))]
            side = int(min(photo.shape[:2]) * (0.3 + 0.7 * float(torch.rand(1, generator=generator))))
            row = int(torch.randint(0, photo.shape[0] - side + 1, (1,), generator=generator))
            column = int(torch.randint(0, photo.shape[1] - side + 1, (1,), generator=generator))
            mix = torch.rand(3, generator=generator)
            crop = torch.from_numpy(photo[row : row + side, column : column + side].copy()) @ (mix / mix.sum())
            crop = F.interpolate(crop[None, None], (SIZE, SIZE), mode="bilinear", antialias=True)
            crop = torch.rot90(crop, int(torch.randint(0, 4, (1,), generator=generator)), (2, 3))
            crop = curve(crop, generator, monotone=True) if float(torch.rand(1, generator=generator)) < 0.4 else crop
            out[k] = crop.flip(3)[0] if float(torch.rand(1, generator=generator)) < 0.5 else crop[0]
        elif pick == 5:
            out[k] = noise
        elif pick == 6:
            out[k] = (noise > 0.3).float() + 0.1 * torch.randn(1, SIZE, SIZE, generator=generator)
        elif pick == 7:
            angle = torch.atan2(axis[None], axis[:, None] + 1.1).abs()
            radius = torch.hypot(axis[None], axis[:, None] + 1.1)
            sector = (angle < 0.5 + 0.3 * float(torch.rand(1, generator=generator))) & (radius > 0.2) & (radius < 2)
            speckle = torch.randn(1, SIZE, SIZE, generator=generator).abs()
            out[k] = sector * F.avg_pool2d(speckle, 3, 1, 1) * (0.4 + torch.sigmoid(2 * noise))
        elif pick in (9, 10):  # blobs of random place, size and brightness on a ground, as in cartoons and still lifes
            out[k] = uniform(1, 0, 1, generator)[0] * (1 + 0.3 * noise)
            for _ in range(int(torch.randint(2, 12, (1,), generator=generator))):
                centre, size = torch.rand(2, generator=generator) * 2 - 1, 0.05 + 0.6 * torch.rand(2, generator=generator)
                power = float(torch.randint(1, 5, (1,), generator=generator)) * 2
                blob = ((axis[:, None] - centre[0]) / size[0]).abs() ** power + ((axis[None] - centre[1]) / size[1]).abs() ** power < 1
                out[k, 0][blob] = float(torch.rand(1, generator=generator))
            out[k] += 0.05 * torch.randn(1, SIZE, SIZE, generator=generator) * float(torch.rand(1, generator=generator))
        elif pick == 8:
            scan = scans[int(torch.randint(0, len(scans), (1,), generator=generator))].float()[None, None]
            scan = F.interpolate(scan, (SIZE, SIZE), mode="bilinear")[0, 0]
            cut = SIZE // 4
            parts = scan.view(4, cut, 4, cut).permute(0, 2, 1, 3).reshape(16, cut, cut)[torch.randperm(16, generator=generator)]
            out[k, 0] = parts.view(4, 4, cut, cut).permute(0, 2, 1, 3).reshape(SIZE, SIZE)
        else:
            slope = torch.randn(2, generator=generator)
            out[k] = axis[None] * slope[0] + axis[:, None] * slope[1] + 0.2 * noise
    return stretch(out)


__all__ = ["BACKGROUND", "augment", "not_a_scan", "plain"]
