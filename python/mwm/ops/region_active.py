"""From regions to masks at once: coverage, inside and sampling, in one launch where a kernel of the cuda or triton backend runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import gpu, native
from .backend import FLOATS, declare, resolve
from .philox import check_counters, check_ids, random_words
from .region_coverage import coverage_threshold, region_coverage
from .registry import register
from .sample_active import sample_active

_MOST_PATCHES = {"cuda": 2048, "triton": 64}

# Elsewhere, and on larger grids, these are the two ops one after the other.
declare("region_active", cpu=(*FLOATS, torch.bool), cuda=(*FLOATS, torch.bool), triton=(*FLOATS, torch.bool), reference=(*FLOATS, torch.bool))


def region_active(
    region: Tensor,
    grid: tuple[int, int],
    ratio: Sequence[int],
    *,
    hidden: int | None = None,
    stream: int = 0,
    min_cover: float = 0.25,
    seed: int,
    ids: Tensor | Sequence[int],
    epoch: int,
    view: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Hide patches at one share inside a region and at another outside; a pure function of its arguments.

    The strata of `sample_active` are 0 outside and 1 inside, as `region_coverage` decides, and 2 for all patches of an image whose
    region is empty. With `hidden` every image hides that many: inside as `ratio[1]` says, as far as the image allows (clamped to
    [max(0, hidden - n_out), min(n_in, hidden)]; the fraction is decided by word 0 of `stream`), outside the rest.

    Args:
        region: What the text names, 0 to 1. float32 | bfloat16 | float16 | float64 | bool, any strides [B, H, W]
        grid: (Gh, Gw); must divide (H, W).
        ratio: Probability of being hidden outside, inside, and where the region is empty, as Q32 integers (`to_q32`).
        hidden: Patches to hide in every image, or None.
        stream: Purpose of the random word that rounds the inside count, in [0, 2¹⁶); read with `hidden` only.
        min_cover: Least covered share of an inside patch, in (0, 1].
        seed, epoch, view: As for `sample_active`.
        ids: One integer in [0, 2³²) per image. [B]
        backend: Forces an implementation; None picks the best.

    Returns:
        (active, inside): True where visible, and True where the patch is region. bool [B, Gh, Gw] each

    Raises:
        TypeError: An argument has the wrong dtype.
        ValueError: A shape or a range does not fit; what lies in tensors on a GPU is a device-side assertion.
        BackendError: `backend` cannot run this input; the message lists the reasons.

    Deterministic, and equal on every backend.
    """
    rows, columns = grid
    threshold = coverage_threshold("region_active", region, rows, columns, min_cover)
    ids = check_ids("region_active", ids).to(region.device, non_blocking=True)
    if ids.shape[0] != region.shape[0]:
        raise ValueError(f"region_active: ids must be [B] with B = {region.shape[0]} (the regions), got {ids.shape[0]} ids. Pass one id per image.")
    if len(ratio) != 3 or not all(0 <= int(share) <= 1 << 32 for share in ratio):
        raise ValueError(f"region_active: ratio must be three Q32 integers in [0, 2**32], got {list(ratio)}. Use to_q32.")
    if hidden is not None and not 0 <= hidden <= rows * columns:
        raise ValueError(f"region_active: hidden must be between 0 and the {rows * columns} patches of the grid, got {hidden}.")
    if not 0 <= stream < 1 << 16:
        raise ValueError(f"region_active: stream must be in [0, 65536), got {stream}.")
    seed = check_counters("region_active", seed, epoch, view)
    rule = [*map(int, ratio), -1 if hidden is None else hidden, stream]
    return _region_active(region, rows, columns, threshold, min_cover, rule, seed, ids, epoch, view, backend or "")


def _implementation(
    region: Tensor, rows: int, columns: int, threshold: int, min_cover: float, rule: list[int], seed: int, ids: Tensor, epoch: int, view: int, backend: str
) -> tuple[Tensor, Tensor]:
    name = resolve("region_active", backend, region)
    if rows * columns > _MOST_PATCHES.get(name, -1):
        inside, _ = region_coverage(region, (rows, columns), min_cover=min_cover, backend=backend)
        return _sample(inside, rule, seed % (1 << 64), ids, epoch, view, backend), inside
    active, inside = _fake(region, rows, columns, threshold, min_cover, rule, seed, ids, epoch, view, backend)
    if name == "triton":
        with gpu.guard(region):
            kernels = gpu.triton_kernels("region_active")
            kernels.region_active(gpu.as_bytes(region), threshold, list(rule), seed, ids, epoch, view, gpu.as_bytes(inside), gpu.as_bytes(active))
        return active, inside
    cover = torch.empty(inside.shape, dtype=torch.int64, device=region.device)
    arguments = (native.view(region), threshold, list(rule), seed, native.view(ids), epoch, view)
    with gpu.guard(region):
        gpu.cuda().region_active(*arguments, native.view(inside), native.view(cover), native.view(active), *gpu.launch(region))
    return active, inside


def _sample(inside: Tensor, rule: list[int], seed: int, ids: Tensor, epoch: int, view: int, backend: str) -> Tensor:
    """The second half by `sample_active`."""
    flat = inside.flatten(1)
    settings = {"grid": inside.shape[1:], "seed": seed, "ids": ids, "epoch": epoch, "view": view, "backend": backend or None}
    *ratio, total, stream = rule
    if total < 0:
        strata = torch.where(flat.any(1, keepdim=True), flat.to(torch.int64), 2)
        return sample_active(strata, torch.tensor(ratio), num_strata=3, **settings)
    n_in = flat.sum(1)
    exact = n_in * ratio[1]
    word = random_words(seed, ids, epoch, view, stream, 1, backend=backend or None)[:, 0]
    wanted = (exact >> 32) + (word < (exact & 0xFFFFFFFF)).to(torch.int64)
    hidden_in = torch.minimum(torch.maximum(wanted, total - (flat.shape[1] - n_in)), n_in.clamp(max=total))
    return sample_active(flat.to(torch.int64), hidden=torch.stack([total - hidden_in, hidden_in], 1), num_strata=2, **settings)


def _fake(
    region: Tensor, rows: int, columns: int, threshold: int, min_cover: float, rule: list[int], seed: int, ids: Tensor, epoch: int, view: int, backend: str
) -> tuple[Tensor, Tensor]:
    shape = (region.shape[0], rows, columns)
    return region.new_empty(shape, dtype=torch.bool), region.new_empty(shape, dtype=torch.bool)


_region_active = register(
    "region_active",
    "(Tensor region, SymInt rows, SymInt columns, SymInt threshold, float min_cover, SymInt[] rule, SymInt seed, Tensor ids, SymInt epoch, SymInt view, str backend)"
    " -> (Tensor, Tensor)",
    _implementation,
    _fake,
)
