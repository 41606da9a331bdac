"""From packed maps to dense ones: norm what is visible, put a learned token where it is not, project."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mwm.mim.dense_convs import Conv3x3
from mwm.ops import TilePlan, tile_conv, tile_conv_between, unpack_tiles
from mwm.sparse import Packed, sparsify


class VisibleLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of every visible position, on packed tiles."""

    def forward(self, x: Packed) -> Tensor:
        """[T, C, t, t] -> [T, C, t, t]"""
        tiles = F.layer_norm(x.tiles.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return tiles.permute(0, 3, 1, 2)


class VisibleBatchNorm(nn.Module):
    """Batch norm over the visible positions of the batch, on packed tiles."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = sparsify(nn.BatchNorm2d(channels))

    def forward(self, x: Packed) -> Tensor:
        """[T, C, t, t] -> [T, C, t, t]"""
        return self.norm(x).tiles


class Densify(nn.Module):
    """One scale of the pyramid, packed to dense.

    dense = project(where(active, norm(x), token))

    Args:
        channels: channels of the map.
        width: channels the decoder wants at this stride.
        deepest: the deepest map is projected by 1x1, and not at all where its channels already fit; the others by 3x3.
        norm: "batch" or "layer", over visible positions.

    Source: Mask What Matters (arXiv 2509.23054) and SparK (arXiv 2301.03580), densifying.
    """

    def __init__(self, channels: int, width: int, *, deepest: bool, norm: str) -> None:
        super().__init__()
        self.norm = VisibleBatchNorm(channels) if norm == "batch" else VisibleLayerNorm(channels, eps=1e-6)
        self.mask_token = nn.Parameter(torch.empty(1, channels, 1, 1))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        if deepest:
            self.project = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1)
        else:
            self.project = Conv3x3(channels, width)

    def forward(self, x: Packed) -> Tensor:
        """Densify.

        Args:
            x: a map of the encoder. [T, C, t, t]

        Returns:
            [B, width, Gh * t, Gw * t]
        """
        return self.project(unpack_tiles(self.norm(x), x.plan, fill=self.mask_token.flatten()))

    def at_visible(self, x: Packed) -> Tensor:
        """The values of `forward` at visible patches, of the deepest scale alone: 1x1 sees no neighbour. [T, width, t, t]"""
        return self.project(Packed(self.norm(x), x.plan)).tiles

    def at_hidden(self, x: Packed, hidden: TilePlan) -> Tensor:
        """The values of `forward` at the patches of the complement, to rounding, without the rest of the map.

        Hidden places hold one token, so that what a window takes from them depends on which of its taps are hidden, not on
        channels: it is the convolution of ones with the filters summed against the token. What it takes from visible
        places is computed along the rim alone.

        Args:
            x: a map of the encoder. [T, C, t, t]
            hidden: the patches that x does not have.

        Returns:
            [hidden.num_tiles, width, t, t]
        """
        edge = x.tiles.shape[-1]
        token = self.mask_token
        if not isinstance(self.project, nn.Conv2d) or self.project.kernel_size == (1, 1):
            return self.project(token).expand(hidden.num_tiles, -1, edge, edge)
        weight, bias = self.project.weight, self.project.bias
        seen = tile_conv_between(self.norm(x), weight, None, x.plan, hidden, padding=1)
        ones = seen.new_ones((hidden.num_tiles, 1, edge, edge))
        return seen + tile_conv(ones, (weight * token).sum(1, keepdim=True).to(ones.dtype), bias.to(ones.dtype), hidden, padding=1)
