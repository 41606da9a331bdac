"""Single convolutions of ResNet-50 and ConvNeXt-T: packed tiles against the dense layer, channels-last, in the same process.

    python -m mwm.bench.bench_layers [--hidden 60] [--batch 8] [--only depthwise] [--bf16] [--json FILE] [--smoke]

Every layer runs twice: the forward pass alone, and forward plus backward (input and weight gradients, as in training). Linear
cost would give 1 / visible; more is possible where hidden neighbours are skipped. `gflops` counts the visible share of the
dense layer's arithmetic per second of our time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from mwm.bench.harness import Row, compare, environment, relative_difference, table, write_json
from torch import Tensor

from mwm import ops
from mwm.ops.tile_conv import pointwise_conv


@dataclass(frozen=True)
class Layer:
    """One convolution at tile edge `edge`; square kernel, padding (kernel - 1) // 2 unless it is a patchify."""

    name: str
    channels: int
    filters: int
    kernel: int
    edge: int
    stride: int = 1
    groups: int = 1
    images: bool = False  # the input is the image, which takes no gradient

    @property
    def padding(self) -> int:
        """As the networks pad."""
        return 0 if self.kernel == self.stride else (self.kernel - 1) // 2


LAYERS = [
    Layer("stem 7x7/2 3-64", 3, 64, 7, 32, 2, images=True),
    Layer("1x1 64-256 t8", 64, 256, 1, 8),
    Layer("1x1 256-64 t8", 256, 64, 1, 8),
    Layer("3x3 64 t8", 64, 64, 3, 8),
    Layer("3x3/2 128 t8", 128, 128, 3, 8, 2),
    Layer("1x1/2 256-512 t8", 256, 512, 1, 8, 2),
    Layer("1x1 128-512 t4", 128, 512, 1, 4),
    Layer("3x3 128 t4", 128, 128, 3, 4),
    Layer("3x3/2 256 t4", 256, 256, 3, 4, 2),
    Layer("1x1 256-1024 t2", 256, 1024, 1, 2),
    Layer("3x3 256 t2", 256, 256, 3, 2),
    Layer("3x3/2 512 t2", 512, 512, 3, 2, 2),
    Layer("1x1 2048-512 t1", 2048, 512, 1, 1),
    Layer("3x3 512 t1", 512, 512, 3, 1),
    Layer("patchify 4x4 3-96", 3, 96, 4, 32, 4, images=True),
    Layer("depthwise 7x7 96 t8", 96, 96, 7, 8, groups=96),
    Layer("depthwise 7x7 192 t4", 192, 192, 7, 4, groups=192),
    Layer("depthwise 7x7 384 t2", 384, 384, 7, 2, groups=384),
    Layer("depthwise 7x7 768 t1", 768, 768, 7, 1, groups=768),
    Layer("patchify 2x2 96-192 t8", 96, 192, 2, 8, 2),
    Layer("depthwise 3x3/2 144 t8", 144, 144, 3, 8, 2, groups=144),
    Layer("depthwise 5x5 240 t4", 240, 240, 5, 4, groups=240),
    Layer("grouped 3x3 128/32 t8", 128, 128, 3, 8, groups=32),
    Layer("grouped 3x3 512/32 t2", 512, 512, 3, 2, groups=32),
]
SMOKE = [Layer("3x3 8 t2", 8, 8, 3, 2), Layer("1x1 8-16 t2", 8, 16, 1, 2), Layer("depthwise 7x7 8 t2", 8, 8, 7, 2, groups=8)]


def _both(function: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(), leaves, grad)


def measure(layer: Layer, hidden: float, *, batch: int = 8, grid: int = 7, dtype: torch.dtype = torch.float32, pairs: int = 9) -> list[Row]:
    """Check one layer against the dense one on the masked input, then time both: forward, and forward plus backward."""
    generator = torch.Generator().manual_seed(0)
    patches = grid * grid
    visible = patches - round(hidden * patches)
    active = (torch.rand(batch, patches, generator=generator).argsort(1) < visible).view(batch, grid, grid)
    plan = ops.build_plan(active, layer.edge, visible=visible)
    size = grid * layer.edge
    dense = torch.randn(batch, layer.channels, size, size, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    scale = (layer.channels // layer.groups * layer.kernel**2) ** -0.5
    weight = (scale * torch.randn(layer.filters, layer.channels // layer.groups, layer.kernel, layer.kernel, generator=generator)).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last).requires_grad_()
    tiles = ops.pack_tiles(dense, plan)
    if not layer.images:
        dense.requires_grad_()
        tiles.requires_grad_()

    def ours() -> Tensor:
        if layer.kernel == 1 and layer.stride == 1:
            return pointwise_conv(tiles, weight, None)
        return ops.tile_conv(tiles, weight, None, plan, stride=layer.stride, padding=layer.padding, groups=layer.groups)

    def rival(x: Tensor = dense) -> Tensor:
        return F.conv2d(x, weight, None, layer.stride, layer.padding, 1, layer.groups)

    with torch.no_grad():
        got = ours()
        want = ops.pack_tiles(rival(ops.unpack_tiles(tiles, plan)), plan)
        whole = rival()
    difference = relative_difference(got, want)
    if not difference < (1e-5 if dtype == torch.float32 else 1e-2):
        raise RuntimeError(f"bench_layers: {layer.name} differs from the dense layer by {difference:.1e}; not timing a wrong result.")
    share = visible / patches
    gflop = 2e-9 * whole.numel() * layer.channels // layer.groups * layer.kernel**2 * share
    rows = []
    for direction, mine, theirs in [
        ("forward", ours, rival),
        (
            "forward + backward",
            _both(ours, [weight] if layer.images else [tiles, weight], torch.randn_like(got)),
            _both(rival, [weight] if layer.images else [dense, weight], torch.randn_like(whole)),
        ),
    ]:
        if direction == "forward":
            mine, theirs = torch.no_grad()(mine), torch.no_grad()(theirs)
        case = f"{layer.name} {direction}{' bf16' if dtype == torch.bfloat16 else ''}"
        (row,) = compare("layers", case, mine, {"dense channels-last": theirs}, pairs=pairs,
                         difference={"dense channels-last": difference}, visible=share)
        passes = 1 if direction == "forward" else 2 if layer.images else 3
        row.extra["gflops"] = round(passes * gflop / (1e-3 * row.ours_ms), 1)
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", nargs="+", type=float, default=[60], help="per cent of the patches")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--only", default="", help="layers whose name contains this")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", help="also write the rows here")
    parser.add_argument("--smoke", action="store_true", help="a few tiny layers, to see that it runs")
    options = parser.parse_args(argv)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    if options.smoke:
        rows = [row for layer in SMOKE for row in measure(layer, 0.5, batch=2, grid=3, dtype=dtype, pairs=1)]
    else:
        rows = [row for hidden in options.hidden for layer in LAYERS if options.only in layer.name
                for row in measure(layer, hidden / 100, batch=options.batch, dtype=dtype, pairs=options.pairs)]
    print(table(rows))
    print(environment())
    if options.json:
        write_json(rows, options.json)
    return rows


if __name__ == "__main__":
    main()
