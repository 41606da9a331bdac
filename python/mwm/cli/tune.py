"""Find the convolutions' block sizes for this machine's GPU and write them as a config table; a command, never a side effect of training.

  mwm tune --list                       the table in use here, and how many candidates would be tried
  mwm tune --quick --out h200.json      three layers and few candidates, minutes
  mwm tune --out h200.json              all layers, half an hour
"""

from __future__ import annotations

import argparse
from pathlib import Path

DIRECTIONS = ("forward", "grad_input", "grad_weight")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to tune and where to write it."""
    parser.add_argument("--ops", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS), metavar="OP", help=f"passes of tile_conv: {', '.join(DIRECTIONS)} (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table to write (default: named after the GPU, in this folder)")
    parser.add_argument("--quick", action="store_true", help="three layers, few candidates")
    parser.add_argument("--list", action="store_true", help="print the table in use and the number of candidates, and measure nothing")


def run(options: argparse.Namespace, words: list[str]) -> int:
    """List or tune."""
    import torch

    from mwm.ops import gpu

    if why := gpu.triton_missing():
        if not options.list or "triton" in why:
            raise ValueError(f"tune: it needs a GPU and triton, but {why}. `mwm tune --list` shows the shipped table.")
    from mwm.bench import tune

    here = torch.cuda.is_available()
    device = tune.conv_configs.device_name(torch.device("cuda", torch.cuda.current_device()) if here else torch.device("cpu"))
    if options.list:
        print("\n".join(tune.listing(options.ops, device)))
        return 0
    out = options.out or Path(next((word for word in torch.cuda.get_device_name().lower().split() if any(map(str.isdigit, word))), "gpu") + ".json")
    tune.tune(options.ops, out, quick=options.quick)
    print(f"wrote {out}. It is used once it lies in {tune.conv_configs.FOLDER}, under a name that is part of the GPU's name.")
    return 0
