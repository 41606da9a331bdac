"""Sizes: images and regions go through the same steps, so that they stay aligned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .settings import ReadSettings


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with antialiasing (a triangle as wide as the pixels it merges); the same for images and regions.

    Args:
        x: float [C, H, W].
        size: (height, width), pixels.
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x[None], size, mode="bilinear", align_corners=False, antialias=True)[0]


def fit(x: Tensor, settings: ReadSettings, spacing: tuple[float, float] | None = None) -> Tensor:
    """Bring an image or a region to `settings.size` as `settings.aspect` says; unchanged where there is no size.

    Args:
        x: float [C, H, W].
        settings: Of which `size` and `aspect` are used.
        spacing: Height and width of a pixel in one unit; None for square pixels.

    Returns:
        float [C, *size].
    """
    if settings.size is None:
        return x
    height, width = settings.size
    if settings.aspect == "stretch":
        return resize(x, settings.size)
    tall, wide = x.shape[-2] * (spacing[0] if spacing else 1.0), x.shape[-1] * (spacing[1] if spacing else 1.0)
    scale = (min if settings.aspect == "pad" else max)(height / tall, width / wide)
    inner = max(1, round(tall * scale)), max(1, round(wide * scale))
    if settings.aspect == "pad":
        inner = min(inner[0], height), min(inner[1], width)
        top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
        return F.pad(resize(x, inner), (left, width - inner[1] - left, top, height - inner[0] - top))
    # Cut in stored pixels first: a needle of an image must not be blown up before it is cut.
    rows = max(1, min(x.shape[-2], round(x.shape[-2] * height / (scale * tall))))
    columns = max(1, min(x.shape[-1], round(x.shape[-1] * width / (scale * wide))))
    top, left = (x.shape[-2] - rows) // 2, (x.shape[-1] - columns) // 2
    return resize(x[..., top : top + rows, left : left + columns], settings.size)


def convert_channels(image: Tensor, channels: int | None) -> Tensor:
    """Change the number of channels: grey to n equal ones, colour to grey by Rec. 601 luma.

    Args:
        image: float [C, H, W].
        channels: Wanted number; None leaves it.

    Raises:
        ValueError: there is no such conversion.
    """
    present = image.shape[0]
    if channels is None or channels == present:
        return image
    if present == 1:
        return image.expand(channels, -1, -1).contiguous()
    if present == 3 and channels == 1:
        return (image * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True).clamp(0, 1)
    raise ValueError(f"channels must be {present} or convertible (1 to any number, 3 to 1), got {channels}")
