"""The whole model written a second time, densely, by multiplication with the mask: the oracle of test_model.py.

It reads the parameters of a `MaskedImageModel` around a `ToyNet` and knows nothing of tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ToyNet(nn.Module):
    """Three strided stages with a norm each, maps at strides 2, 4, 8; the last stage has an inner 3x3."""

    def __init__(self, in_chans: int = 2, norm: str = "batch") -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in ((in_chans, 4), (4, 6), (6, 8)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) if norm == "batch" else nn.Identity() for c in (4, 6, 8))
        self.inner = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for conv, norm in zip(self.stages, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
            maps.append(x)
        maps[-1] = self.inner(maps[-1])
        return maps


def _expand(active: Tensor, like: Tensor) -> Tensor:
    rows, columns = like.shape[2] // active.shape[1], like.shape[3] // active.shape[2]
    return active.repeat_interleave(rows, 1).repeat_interleave(columns, 2)[:, None]


def _visible_norm(x: Tensor, mask: Tensor, norm: nn.Module) -> Tensor:
    if isinstance(norm, nn.Identity):
        return x
    count = mask.sum() if x.shape[0] else 0
    mean = (x * mask).sum((0, 2, 3), keepdim=True) / count
    variance = ((x - mean).square() * mask).sum((0, 2, 3), keepdim=True) / count
    y = (x - mean) / torch.sqrt(variance + norm.eps)
    return (y * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)) * mask


def _layer_norm(x: Tensor, mask: Tensor, norm: nn.LayerNorm) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    y = (x - mean) / torch.sqrt(variance + norm.eps)
    return (y * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)) * mask


def _decode_hidden(decoder: nn.Module, levels: list[Tensor | None], active: Tensor) -> Tensor:
    """Every layer's output times the hidden mask; of visible places the blocks see the deepest level alone."""
    x = levels[0]
    for level, (double, first, norm, act, second, last_norm) in zip(levels, decoder.blocks, strict=True):
        if level is not None and level is not x:
            x = (x + level) * _expand(~active, x)
        y = double(x)
        mask = _expand(~active, y)
        y = act(_visible_norm(first(y * mask) * mask, mask, norm)) * mask
        x = _visible_norm(second(y) * mask, mask, last_norm)
    return decoder.pixels(x)


def twin_loss(model: nn.Module, images: Tensor, active: Tensor, decode: str = "dense") -> Tensor:
    """The loss of `model(images, active)`, mask by multiplication, patches by a loop."""
    x = images * _expand(active, images)
    maps = []
    for conv, norm in zip(model.net.stages, model.net.norms, strict=True):
        x = conv(x)
        mask = _expand(active, x)
        x = F.relu(_visible_norm(x * mask, mask, norm)) * mask
        maps.append(x)
    maps[-1] = model.net.inner(maps[-1]) * _expand(active, maps[-1])
    dense = {}
    for stride, x in ((4, maps[1]), (8, maps[2])):
        part = model.densify[str(stride)]
        mask = _expand(active, x)
        x = _layer_norm(x, mask, part.norm) if isinstance(part.norm, nn.LayerNorm) else _visible_norm(x, mask, part.norm.norm)
        dense[stride] = part.project(x + part.mask_token * ~mask)
    if decode == "hidden":
        y = _decode_hidden(model.decoder, [dense[8], dense[4], None], active)
    else:
        y = model.decoder.blocks[0](dense[8])
        y = model.decoder.blocks[1](y + dense[4])
        y = model.decoder.pixels(model.decoder.blocks[2](y))
    p, errors = model.patch_size, []
    for b, i, j in (~active).nonzero().tolist():
        window = (b, slice(None), slice(i * p, (i + 1) * p), slice(j * p, (j + 1) * p))
        target = images[window]
        std = target.var(correction=0)
        if std.sqrt() >= model.min_std:
            errors.append((y[window] - (target - target.mean()) / torch.sqrt(std + 1e-6)).square().mean())
    return torch.stack(errors).mean()
