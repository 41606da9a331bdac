"""The light U-Net decoder: from the densified pyramid to pixels."""

from __future__ import annotations

from torch import Tensor, nn

from mwm.ops import TilePlan, pack_tiles
from mwm.sparse import Packed


class DecoderBlock(nn.Sequential):
    """Double the resolution, then mix: {transposed conv 4x4 s2, conv 3x3, norm, ReLU6, conv 3x3, norm}.

    [B, channels, h, w] -> [B, out_channels, 2h, 2w]
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(
            nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU6(),  # in place it would keep a copy of its input for backward
            nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )


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
        for level, block in zip(levels, self.blocks, strict=True):
            x = block(x if level is None or level is x else x + level)
        return self.pixels(x)

    def decode_tiles(self, levels: list[Tensor | None], plan: TilePlan) -> Tensor:
        """Decode the tiles of a plan only.

        The transposed convolution of a block reads the whole level, so that what surrounds a tile enters at every stride, one
        position deep; of what the blocks themselves computed, it and the 3x3 convolutions see tiles of the plan, and zero
        beside them. The norms' statistics are those of the plan's tiles. With all patches in the plan this is `forward`.

        Args:
            levels: as in `forward`.
            plan: the tiles to decode, on a grid whose patches are 2^blocks * k pixels.

        Returns:
            Predicted pixels of the tiles. [T, out_channels, p, p]
        """
        x: Packed | None = None
        for level, (double, *mix) in zip(levels, self.blocks, strict=True):
            source = level if x is None else x.unpack() if level is None else x.unpack() + level
            x = Packed(pack_tiles(double(source), plan), plan)
            for layer in mix:
                x = layer(x)
        return self.pixels(x).tiles
