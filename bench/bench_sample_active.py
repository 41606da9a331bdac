"""Masks for 1024 images through the public call, against one turn of a Python loop per image, as the authors draw them.

Two strata (inside the region or not), the counts of both sides checked image by image. Other rivals are shown beside: one batched
argsort with counts fixed for all images, which cannot have counts per image and stratum, and our plain-torch reference.
"""

from __future__ import annotations

from functools import partial

import torch
from mwm.bench.authors_step import draw_masks
from mwm.bench.harness import Case, Check, Match, timed
from mwm.bench.settings import Settings
from torch import Tensor

from mwm import ops

HIGH, LOW = 0.8, 0.4


def argsort(inside: Tensor) -> Tensor:
    """The batched way when counts are equal: sort noise, keep the first ones. bool [B, L] -> bool [B, L]"""
    order = torch.rand(inside.shape).argsort(1)
    return torch.zeros(inside.shape, dtype=torch.bool).scatter_(1, order[:, : round(0.4 * inside.shape[1])], True)


def count_mismatch(ours: Tensor, theirs: Tensor, inside: Tensor) -> float:
    """Largest difference of the visible counts of any image and stratum, in patches. bool [B, L] each"""
    return float(max(((ours & where).sum(1) - (theirs & where).sum(1)).abs().max() for where in (inside, ~inside)))


def prepare(batch: int, edge: int, *, all_rivals: bool = True) -> Match:
    """Our call on inside-grids and the loops that do the same."""
    inside = torch.rand(batch, edge * edge, generator=torch.Generator().manual_seed(0)) < 0.5
    ratio, ids = ops.to_q32([LOW, HIGH]), torch.arange(batch)

    def ours(backend: str | None = None) -> Tensor:
        return ops.sample_active(inside, ratio, grid=(edge, edge), seed=0, ids=ids, epoch=0, backend=backend)

    masks = ours()
    wrong = float((masks != ours("reference")).sum())
    # The authors round the kept counts down, ours are exact in the mean: one patch apart is agreement.
    loop = max(wrong, count_mismatch(masks.flatten(1), draw_masks(inside, HIGH, LOW), inside) - 1)
    rivals = {"authors' loop": timed(lambda: draw_masks(inside, HIGH, LOW))}
    checks = {"authors' loop": Check(max(loop, 0.0), 0.0)}
    if all_rivals:
        rivals |= {"batched argsort (equal counts only)": timed(lambda: argsort(inside)), "our plain-torch reference": timed(lambda: ours("reference"))}
        checks |= dict.fromkeys(("batched argsort (equal counts only)", "our plain-torch reference"), Check(wrong, 0.0))
    return Match(timed(ours), rivals, checks)


def cases(settings: Settings) -> list[Case]:
    """1024 images on both grids."""
    if settings.smoke:
        return [Case("sampler", "smoke: 16 images of 3x3", partial(prepare, 16, 3), 1)]
    return [Case("sampler", f"1024 images of {edge}x{edge}", partial(prepare, 1024, edge), 9) for edge in (7, 14)]
