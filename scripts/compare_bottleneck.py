"""How near the fast setting of `bottleneck` comes to the faithful one: correlation of maps, against that of two faithful runs of different seeds.

    python scripts/compare_bottleneck.py CHECKPOINT IMAGES.csv [--images 12] [--prompt TEXT] [--layer N] [--beta X]

Also printed: overlap of the 20 % of patches with the largest values, and Dice with the masks of the CSV (cut at the 80th percentile). One line per setting.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mwm.data import ReadSettings, read_image, read_list, read_record_mask
from mwm.localize import create_localizer

SETTINGS: dict[str, dict[str, Any]] = {"fast": {"setting": "fast"}}


def correlation(a: Tensor, b: Tensor) -> float:
    """Mean over images of the correlation of two sets of maps [B, H, W]."""
    a, b = (F.normalize(x.flatten(1).double() - x.flatten(1).double().mean(1, keepdim=True), dim=1) for x in (a, b))
    return float((a * b).sum(1).mean())


def top(maps: Tensor, share: float = 0.2) -> Tensor:
    """The largest values of each map. [B, H, W] → bool [B, H·W]"""
    flat = maps.flatten(1)
    found = torch.zeros_like(flat, dtype=torch.bool)
    return found.scatter(1, flat.topk(max(1, round(share * flat.shape[1])), dim=1).indices, True)


def overlap(a: Tensor, b: Tensor, grid: tuple[int, int]) -> float:
    """Mean share of the top patches of a that are among those of b."""
    a, b = (top(F.adaptive_avg_pool2d(x[:, None], grid)[:, 0]) for x in (a, b))
    return float(((a & b).sum(1) / a.sum(1)).mean())


def dice(maps: Tensor, masks: Tensor) -> float:
    """Mean Dice of the top 20 % of pixels with masks [B, H, W]."""
    a, b = top(maps), masks.flatten(1) > 0.5
    return float((2 * (a & b).sum(1) / (a.sum(1) + b.sum(1))).mean())


def read(path: Path, count: int, size: int, split: str) -> tuple[Tensor, Tensor]:
    """Images and masks [N, size, size] from a CSV, spread over its rows."""
    settings = ReadSettings(aspect="stretch")
    records = [record for record in read_list(path, split=split, settings=settings) if record.mask]
    records = records[:: max(1, len(records) // count)][:count]
    images = [F.interpolate(read_image(record, settings)[None], (size, size), mode="bilinear", antialias=True).clamp(0, 1)[0] for record in records]
    masks = [F.interpolate(read_record_mask(record.mask, record, settings)[None, None].float(), (size, size), mode="area")[0, 0] for record in records]
    return torch.stack(images), torch.stack(masks)


def main() -> None:
    """Read, map, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("csv", type=Path)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--split", default="val")
    parser.add_argument("--prompt", default="a brain mri showing a tumour of the brain")
    parser.add_argument("--layer", type=int, default=None)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    common = {"checkpoint": given.checkpoint, "layer": given.layer, "beta": given.beta}
    tower = create_localizer("bottleneck", copies=1, steps=2, **common).tower
    images, masks = read(given.csv, given.images, tower.size[0], given.split)
    texts = [given.prompt] * len(images)
    faithful = [create_localizer("bottleneck", seed=seed, **common)(images, texts) for seed in range(given.seeds)]
    pairs = list(itertools.combinations(faithful, 2))
    between = sum(correlation(a, b) for a, b in pairs) / len(pairs)
    print(f"{len(images)} images; two faithful runs: correlation {between:.4f}, top patches {sum(overlap(a, b, tower.grid) for a, b in pairs) / len(pairs):.3f}, "
          f"Dice {sum(dice(a, masks) for a in faithful) / len(faithful):.4f}", flush=True)
    for name, settings in SETTINGS.items():
        start = time.process_time()
        maps = [create_localizer("bottleneck", seed=100 + seed, **settings, **common)(images, texts) for seed in range(given.seeds)]
        spent = (time.process_time() - start) / given.seeds / len(images)
        both = list(itertools.product(maps, faithful))
        mean = sum(correlation(a, b) for a, b in both) / len(both)
        print(f"{name}: correlation with faithful {mean:.4f} ({mean / between:.3f} of that of two faithful runs), top patches "
              f"{sum(overlap(a, b, tower.grid) for a, b in both) / len(both):.3f}, Dice {sum(dice(a, masks) for a in maps) / len(maps):.4f}, "
              f"{spent:.2f} s of CPU time per image", flush=True)


if __name__ == "__main__":
    main()
