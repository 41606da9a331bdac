"""Masks for 1024 images of 7 x 7 patches, two strata: one call, against one Python loop turn per image.

    python -m mwm.bench.bench_sample_active [--threads N] [--json FILE]

The rivals draw masks of the same counts, but not the
same masks: a loop over images with torch.randperm per stratum, and one batched argsort of torch.rand with counts fixed for all images,
which cannot have counts per image and stratum, nor repeat itself when the batch changes.
"""

from __future__ import annotations

import argparse

import torch
from mwm.bench.harness import compare, table, write_json
from torch import Tensor

from mwm import ops

BATCH, PATCHES, GRID = 1024, 49, (7, 7)
HIGH, LOW = 0.8, 0.4


def loop(strata: Tensor) -> Tensor:
    """One image after the other, as training scripts do."""
    active = torch.ones(strata.shape, dtype=torch.bool)
    for row, inside in zip(active, strata, strict=True):
        for kind, ratio in ((1, HIGH), (0, LOW)):
            where = (inside == kind).nonzero().flatten()
            row[where[torch.randperm(len(where))[: round(ratio * len(where))]]] = False
    return active


def argsort(strata: Tensor) -> Tensor:
    """The batched way when counts are equal: sort noise, hide the first ones."""
    order = torch.rand(strata.shape).argsort(1)
    active = torch.ones(strata.shape, dtype=torch.bool)
    return active.scatter_(1, order[:, : round(0.6 * PATCHES)], False)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    strata = torch.randint(0, 2, (BATCH, PATCHES), dtype=torch.uint8)
    ratio, ids = ops.to_q32([LOW, HIGH]), torch.arange(BATCH)

    def ours(backend: str | None = None) -> Tensor:
        return ops.sample_active(strata, ratio, grid=GRID, seed=0, ids=ids, epoch=0, backend=backend)

    assert torch.equal(ours(), ours("reference"))
    rivals = {"python loop": lambda: loop(strata), "batched argsort": lambda: argsort(strata), "our plain-torch reference": lambda: ours("reference")}
    rows = compare("sample_active", f"{BATCH} x {GRID[0]}x{GRID[1]}, {torch.get_num_threads()} threads", ours, rivals, pairs=9)
    print(table(rows))
    if options.json:
        write_json(rows, options.json)


if __name__ == "__main__":
    main()
