"""The rival of the whole step: pre-training as the method's authors run it, written anew from the description.

SparK-style masked encoder in NCHW float32 (`mask_multiply`), every map normed over its visible positions, mask tokens where hidden,
projected, decoded by a U-Net of transposed convolutions, compared with per-patch-normalised pixels on hidden patches; masks are
drawn image by image in Python (Mask What Matters, arXiv 2509.23054; SparK, arXiv 2301.03580).
"""

from __future__ import annotations

import copy

import torch
from mwm.bench.mask_multiply import MaskMultiply
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-6


def draw_masks(inside: Tensor, high: float, low: float) -> Tensor:
    """Masks image by image: inside patches hidden at `high`, the others at `low`, kept counts rounded down.

    bool [B, L] -> True where visible, bool [B, L]
    """
    active = torch.zeros(inside.shape, dtype=torch.bool)
    for image, region in enumerate(inside):
        for where, ratio in ((region.nonzero().flatten(), high), ((~region).nonzero().flatten(), low)):
            keep = int(where.numel() * (1 - ratio))
            active[image, where[torch.randperm(where.numel())[:keep]]] = True
    return active


def nearest_grid(region: Tensor, grid: tuple[int, int]) -> Tensor:
    """The region on the patch grid by one pixel per patch. float [B, H, W] -> bool [B, L]"""
    return (F.interpolate(region[:, None], size=grid, mode="nearest") > 0.5).flatten(1)


class AuthorsModel(nn.Module):
    """Encoder, densify, decoder and loss as the authors' step has them, with the weights of one of our models.

    Args:
        encoder: the dense network, a list of maps of doubling stride; it is copied.
        model: a `mwm.MaskedImageModel` around the same network, batch norm in densify; its parts are copied to NCHW.
    """

    def __init__(self, encoder: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.encoder = MaskMultiply(encoder)
        self.patch_size = model.patch_size
        parts = [model.densify[str(stride)] for stride in reversed(model.strides)]  # deepest first
        self.norms = nn.ModuleList(_plain_norm(part.norm.norm) for part in parts)
        self.tokens = nn.ParameterList(part.mask_token.detach().clone() for part in parts)
        self.projections = nn.ModuleList(_plain(part.project) for part in parts)
        self.blocks = nn.ModuleList(nn.Sequential(*map(_plain, block)) for block in model.decoder.blocks)
        self.pixels = copy.deepcopy(model.decoder.pixels)
        self.to(memory_format=torch.contiguous_format)

    def forward(self, images: Tensor, active: Tensor) -> Tensor:
        """The loss. float [B, C, H, W], bool [B, Gh, Gw] -> []"""
        maps = self.encoder(images, active)[::-1]
        x = self._densify(0, maps[0], active)
        for level, block in enumerate(self.blocks):
            if 0 < level < len(maps):
                x = x + self._densify(level, maps[level], active)
            x = block(x)
        return self._loss(self.pixels(x), images, active)

    def _densify(self, level: int, x: Tensor, active: Tensor) -> Tensor:
        edge = x.shape[-1] // active.shape[-1]
        visible = active.repeat_interleave(edge, 1).repeat_interleave(edge, 2)
        where = visible.nonzero(as_tuple=True)
        rows = self.norms[level](x.permute(0, 2, 3, 1)[where])
        normed = torch.zeros_like(x).permute(0, 2, 3, 1)
        normed[where] = rows.to(normed.dtype)
        filled = torch.where(visible[:, None], normed.permute(0, 3, 1, 2), self.tokens[level].to(normed.dtype))
        return self.projections[level](filled)

    def _loss(self, predicted: Tensor, images: Tensor, active: Tensor) -> Tensor:
        target, found = self._patches(images), self._patches(predicted)
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True, correction=0)
        error = (found - (target - mean) / (variance + EPSILON).sqrt()).square().mean(-1)
        hidden = (~active).flatten(1)
        return (error * hidden).sum() / (hidden.sum() + 1e-8)

    def _patches(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, L, p * p * C]"""
        batch, channels, height, width = x.shape
        p = self.patch_size
        x = x.reshape(batch, channels, height // p, p, width // p, p)
        return torch.einsum("bchpwq->bhwpqc", x).reshape(batch, (height // p) * (width // p), p * p * channels)


def _plain_norm(norm: nn.BatchNorm2d) -> nn.BatchNorm1d:
    plain = nn.BatchNorm1d(norm.num_features, norm.eps, norm.momentum)
    plain.load_state_dict(norm.state_dict())
    return plain


def _plain(layer: nn.Module) -> nn.Module:
    """A copy that computes as torch does, whatever our own layer of that place does."""
    if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        return copy.deepcopy(layer)
    kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.ConvTranspose2d
    plain = kind(layer.in_channels, layer.out_channels, layer.kernel_size, stride=layer.stride, padding=layer.padding, bias=layer.bias is not None)
    plain.load_state_dict(layer.state_dict())
    return plain
