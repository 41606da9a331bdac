"""A whole encoder, forward and backward: packed tiles against the dense network and against mask-multiply.

    python -m mwm.bench.bench_encoder [--encoder resnet50] [--hidden 40 60 75] [--batch 8] [--json FILE] [--smoke]

Timed from dense images to all maps unpacked, plan, pack and unpack included; gradients accumulate into `.grad`, as in training.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import timm
import torch
from mwm.bench.harness import Row, compare, environment, relative_difference, table, write_json
from mwm.bench.mask_multiply import MaskMultiply
from torch import Tensor

import mwm


def random_active(batch: int, grid: tuple[int, int], hidden: float, seed: int = 0) -> tuple[Tensor, int]:
    """The same number of visible patches in every image. bool [B, Gh, Gw], and that number."""
    patches = grid[0] * grid[1]
    visible = patches - round(hidden * patches)
    order = torch.rand(batch, patches, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return (order < visible).view(batch, *grid), visible


def _step(maps: Callable[[], list[Tensor]], weights: list[Tensor]) -> Callable[[], None]:
    def step() -> None:
        total = sum((m * w).sum() for m, w in zip(maps(), weights, strict=True))
        total.backward()

    return step


def measure(encoder: str, hidden: float, *, batch: int = 8, size: int = 224, patch: int = 32, bf16: bool = False, pairs: int = 7,
            rivals: tuple[str, ...] = ("dense channels-last", "mask-multiply NCHW", "mask-multiply channels-last")) -> list[Row]:
    """Check that all sides compute the same maps, then time one training step of the encoder on each."""
    torch.manual_seed(0)
    dense = timm.create_model(encoder, features_only=True).train()
    ours = mwm.sparsify(copy.deepcopy(dense)).to(memory_format=torch.channels_last)
    masked = MaskMultiply(dense)
    masked_last = MaskMultiply(dense).to(memory_format=torch.channels_last)
    dense = dense.to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size)
    images_last = images.to(memory_format=torch.channels_last)
    active, visible = random_active(batch, (size // patch, size // patch), hidden)

    def run_ours() -> list[Tensor]:
        return [m.unpack() for m in ours(mwm.pack(images_last, active, visible=visible))]

    sides: dict[str, Callable[[], list[Tensor]]] = {
        "dense channels-last": lambda: dense(images_last),
        "mask-multiply NCHW": lambda: masked(images, active),
        "mask-multiply channels-last": lambda: masked_last(images_last, active),
    }
    with torch.no_grad():
        got, want = run_ours(), masked(images, active)
        difference = max(relative_difference(a, b) for a, b in zip(got, want, strict=True))
    if not difference < 1e-4:
        raise RuntimeError(f"bench_encoder: {encoder} on packed tiles differs from mask-multiply by {difference:.1e}; not timing a wrong result.")
    weights = [torch.randn_like(m) for m in want]

    def wrap(maps: Callable[[], list[Tensor]]) -> Callable[[], None]:
        step = _step(maps, weights)
        if not bf16:
            return step

        def cast() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                step()

        return cast

    return compare("encoder", f"{encoder} {round(100 * hidden)} % hidden{' bf16' if bf16 else ''}", wrap(run_ours),
                   {name: wrap(sides[name]) for name in rivals}, pairs=pairs,
                   difference={name: difference for name in rivals if "mask" in name}, visible=visible / active[0].numel())


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", nargs="+", default=["resnet50"], help="timm names")
    parser.add_argument("--hidden", nargs="+", type=float, default=[40, 60, 75], help="per cent of the patches")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast on every side")
    parser.add_argument("--json", help="also write the rows here")
    parser.add_argument("--smoke", action="store_true", help="one tiny case, to see that it runs")
    options = parser.parse_args(argv)
    if options.smoke:
        rows = measure("resnet18", 0.6, batch=1, size=64, pairs=1)
    else:
        rows = [row for name in options.encoder for hidden in options.hidden
                for row in measure(name, hidden / 100, batch=options.batch, bf16=options.bf16, pairs=options.pairs)]
    print(table(rows))
    print(environment())
    if options.json:
        write_json(rows, options.json)
    return rows


if __name__ == "__main__":
    main()
