"""The light U-Net decoder: from the densified pyramid to pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mwm.mim.dense_convs import Conv3x3, Doubling
from mwm.ops import TilePlan, batch_moments, batch_norm, has_kernel, tile_conv_between
from mwm.sparse import Packed


class DecoderBlock(nn.Sequential):
    """Double the resolution, then mix: {transposed conv 4x4 s2, conv 3x3, norm, ReLU6, conv 3x3, norm}.

    [B, channels, h, w] -> [B, out_channels, 2h, 2w]
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(
            Doubling(channels, channels),
            Conv3x3(channels, channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU6(),  # in place it would keep a copy of its input for backward
            Conv3x3(channels, out_channels, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """The layers in turn, then `skip` added, with norms, activation and sum in one pass over memory where that is possible."""
        double, first, norm, _, second, last = self
        x = _normalise(norm, first(double(x)), activation="relu6")
        return _normalise(last, second(x), skip=skip)


def _normalise(norm: nn.BatchNorm2d, x: Tensor, *, activation: str | None = None, skip: Tensor | None = None) -> Tensor:
    """norm(x), then a sum or an activation; in one pass in eager training where that has a kernel, through the modules elsewhere."""
    plain = type(norm) is nn.BatchNorm2d and norm.training and norm.momentum is not None and not norm._forward_hooks and not norm._forward_pre_hooks
    eager = torch.is_grad_enabled() and not torch.compiler.is_compiling() and type(x) is Tensor
    if plain and eager and x.numel() >= 2 * x.shape[1] and has_kernel("batch_norm", x):
        norm.num_batches_tracked.add_(1)
        moments = batch_moments(x, norm.running_mean, norm.running_var, momentum=norm.momentum)
        skip = skip if skip is None else skip.to(x.dtype)
        return batch_norm(x, *moments, norm.weight, norm.bias, eps=norm.eps, residual=skip, activation=activation)
    x = norm(x)
    x = x if skip is None else x + skip
    return F.relu6(x) if activation == "relu6" else x


class Decoder(nn.Module):
    """Blocks of halving width; the pyramid's maps are added before the block of their stride.

    Args:
        width: channels at the deepest stride; a multiple of 2^blocks.
        blocks: number of doublings, log2 of the deepest stride.
        out_channels: channels of the image.

    Raises:
        ValueError: the width cannot be halved so often.

    Source: Mask What Matters (arXiv 2509.23054), decoder; width 768 there.
    """

    def __init__(self, width: int, blocks: int, out_channels: int) -> None:
        super().__init__()
        if width <= 0 or width % 2**blocks:
            raise ValueError(f"Decoder: decoder_width must be a multiple of {2**blocks} (it is halved {blocks} times), got {width}. "
                             f"Try {max(1, round(width / 2**blocks)) * 2**blocks}.")
        self.widths = [width >> level for level in range(blocks + 1)]
        self.blocks = nn.ModuleList(DecoderBlock(wide, narrow) for wide, narrow in zip(self.widths, self.widths[1:], strict=False))
        self.pixels = nn.Conv2d(self.widths[-1], out_channels, 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, levels: list[Tensor | None]) -> Tensor:
        """Decode everywhere.

        Args:
            levels: one entry per block, deepest first; None where the pyramid has no map of that stride (never the
                first). Entry i: [B, width / 2^i, h * 2^i, w * 2^i]

        Returns:
            Predicted pixels. [B, out_channels, h * 2^blocks, w * 2^blocks]
        """
        x = levels[0]
        for block, skip in zip(self.blocks, [*levels[1:], None], strict=True):
            x = block(x, skip)
        return self.pixels(x)

    def decode_tiles(self, levels: list[Tensor | None], plan: TilePlan, around: Packed) -> Tensor:
        """Decode the tiles of a plan only.

        Beside them a level is zero, but for the deepest, which is whole: what surrounds a tile enters through the first
        transposed convolution, and through what the levels themselves have read of it. The norms' statistics are those of
        the plan's tiles. With all patches in the plan this is `forward`.

        Args:
            levels: as in `forward`, tiles of the plan. Entry i: [T, width / 2^i, t * 2^i, t * 2^i]
            plan: the T tiles to decode.
            around: the deepest level at all other places. [S, width, t, t]

        Returns:
            Predicted pixels. [T, out_channels, p, p]
        """
        x = Packed(levels[0], plan)
        for number, (block, skip) in enumerate(zip(self.blocks, [*levels[1:], None], strict=True)):
            double, first, norm, _, second, last = block
            doubled = tile_conv_between(x.tiles, double.weight, double.bias, plan, plan, stride=2, padding=1, transposed=True)
            if number == 0:
                doubled = doubled + tile_conv_between(around.tiles, double.weight, None, around.plan, plan, stride=2, padding=1, transposed=True)
            x = Packed(doubled, plan)
            x = last(second(F.relu6(norm(first(x)))))
            x = x if skip is None else x + Packed(skip, plan)
        return self.pixels(x).tiles
