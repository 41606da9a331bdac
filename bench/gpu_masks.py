"""What is done for every batch before the network on a GPU: coverage, masks, plan and packing.

The masks' bar is a time, not a ratio: 4096 images of 7x7 in one launch of at most 20 µs. It stands in the table as a rival that
always takes 20 µs. Other rivals: the plain torch way of the same device.
"""

from __future__ import annotations

from functools import partial

import torch
from mwm.bench.gpu_timing import event_timed, graph_timed
from mwm.bench.harness import Case, Check, Match
from mwm.bench.settings import Settings
from torch import Tensor

from mwm import ops
from mwm.ops import reference

LOW, HIGH = 0.4, 0.8
BAR = "the bar of 20 µs"
_BAR_MS = 0.020


def _backends(op: str, x: Tensor) -> list[str]:
    """The GPU backends that run `op` here; "cpu" in a smoke run without a GPU."""
    names = ("cuda", "triton") if x.is_cuda else ("cpu",)
    found = [name for name in names if not ops.reasons(op, name, x)]
    if not found:
        raise RuntimeError(f"no GPU backend runs {op}: " + "; ".join(reason for name in names for reason in ops.reasons(op, name, x)))
    return found


def _different(ours: Tensor, other: Tensor) -> Check:
    return Check(float((ours != other).sum()), 0.0)


def argsort(inside: Tensor) -> Tensor:
    """The batched way when counts are equal: sort noise, keep the first ones. bool [B, L] -> bool [B, L]"""
    order = torch.rand(inside.shape, device=inside.device).argsort(1)
    return torch.zeros_like(inside).scatter_(1, order[:, : round(0.4 * inside.shape[1])], True)


def sampler(backend: str, batch: int, edge: int, device: str, timing: str) -> Match:
    """Strata to masks."""
    inside = (torch.rand(batch, edge * edge, generator=torch.Generator().manual_seed(0)) < 0.5).to(device)
    ratio, ids = ops.to_q32([LOW, HIGH]).to(device), torch.arange(batch, device=device)

    def ours() -> Tensor:
        return ops.sample_active(inside, ratio, grid=(edge, edge), seed=0, ids=ids, epoch=0, backend=backend)

    check = _different(ours().cpu(), ops.sample_active(inside.cpu(), ratio.cpu(), grid=(edge, edge), seed=0, ids=ids.cpu(), epoch=0, backend="cpu"))
    read = graph_timed if timing == "graph" else event_timed
    rivals = {"batched argsort (equal counts only)": event_timed(lambda: argsort(inside), device)}
    if edge == 7 and timing == "graph":
        rivals[BAR] = lambda: _BAR_MS
    return Match(read(ours, device), rivals, dict.fromkeys(rivals, check))


def from_regions(backend: str, batch: int, size: int, device: str) -> Match:
    """Regions on pixels to masks in one launch, against the two ops one after the other."""
    region = torch.rand(batch, size, size, device=device)
    ids, grid, ratio = torch.arange(batch, device=device), (size // 32, size // 32), ops.to_q32([LOW, HIGH, 0.6]).tolist()
    settings = {"seed": 0, "ids": ids, "epoch": 0}

    def ours() -> Tensor:
        return ops.region_active(region, grid, ratio, backend=backend, **settings)[0]

    def steps() -> Tensor:
        flat = ops.region_coverage(region, grid, backend=backend)[0].flatten(1)
        strata = torch.where(flat.any(1, keepdim=True), flat.to(torch.int64), 2)
        return ops.sample_active(strata, q32, grid=grid, backend=backend, **settings)

    q32 = torch.tensor(ratio, device=device)
    return Match(event_timed(ours, device), {"two ops": event_timed(steps, device)}, {"two ops": _different(ours(), steps())})


def coverage(backend: str, batch: int, size: int, device: str) -> Match:
    """Regions on pixels to inside grids, against plain torch."""
    region, grid = torch.rand(batch, size, size, device=device), (size // 32, size // 32)

    def ours() -> Tensor:
        return ops.region_coverage(region, grid, backend=backend)[0]

    def plain() -> Tensor:
        return ops.region_coverage(region, grid, backend="reference")[0]

    return Match(graph_timed(ours, device), {"plain torch": event_timed(plain, device)}, {"plain torch": _different(ours(), plain())},
                 notes={"": f"reads {region.numel() * 4 / 2**20:.0f} MiB"})


def plan(backend: str, batch: int, device: str, known: bool) -> Match:
    """Masks to plans; 7x7 with 20 visible patches."""
    order = torch.rand(batch, 49, generator=torch.Generator().manual_seed(0)).argsort(1)
    active, visible = (order < 20).reshape(batch, 7, 7).to(device), 20 if known else None

    def ours() -> Tensor:
        return ops.build_plan(active, 32, visible=visible, backend=backend).coords

    def plain() -> Tensor:
        return reference.build_plan(active, 20 if known else -1)[0]

    read = graph_timed if known else event_timed  # a wait cannot be captured
    return Match(read(ours, device), {"plain torch": event_timed(plain, device)}, {"plain torch": _different(ours(), plain())})


def pack(backend: str, batch: int, channels: int, size: int, device: str) -> Match:
    """Images to tiles, against boolean indexing of a view."""
    order = torch.rand(batch, 49, generator=torch.Generator().manual_seed(0)).argsort(1)
    active = (order < 20).reshape(batch, 7, 7).to(device)
    images = torch.randn(batch, channels, size, size, device=device, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    of = ops.build_plan(active, size // 7, visible=20)

    def ours() -> Tensor:
        return ops.pack_tiles(images, of, backend=backend)

    def plain() -> Tensor:
        return reference.pack_tiles(images, active)

    return Match(graph_timed(ours, device), {"boolean indexing": event_timed(plain, device)}, {"boolean indexing": _different(ours(), plain())}, visible=20 / 49)


def cases(settings: Settings, device: str) -> list[Case]:
    """Every backend that runs here."""
    bench, found = "gpu masks", []
    batch, images, size = (16, 4, 224) if settings.smoke else (4096, 128, 224)
    mark = "smoke: " if settings.smoke else ""
    for name in _backends("sample_active", torch.empty(1, dtype=torch.int64, device=device)):
        for timing in ("graph", "eager"):
            found.append(Case(bench, f"{mark}sampling, {batch} images of 7x7, {name}, {timing}", partial(sampler, name, batch, 7, device, timing), 9))
        found.append(Case(bench, f"{mark}sampling, {batch // 4} images of 14x14, {name}, graph", partial(sampler, name, batch // 4, 14, device, "graph"), 9, True))
        found.append(Case(bench, f"{mark}regions to masks, {images} images of 224, {name}", partial(from_regions, name, images, size, device), 9, True))
    for name in _backends("region_coverage", torch.empty(1, device=device)):
        found.append(Case(bench, f"{mark}coverage, {images} regions of 224, {name}", partial(coverage, name, images, size, device), 9, True))
    for name in _backends("build_plan", torch.empty(1, dtype=torch.bool, device=device)):
        for known in (True, False):
            found.append(Case(bench, f"{mark}plan, {images} masks, count {'known' if known else 'unknown'}, {name}", partial(plan, name, images, device, known), 9, True))
    for name in _backends("pack_tiles", torch.empty(1, dtype=torch.bfloat16, device=device)):
        for channels in (3, 64):
            found.append(Case(bench, f"{mark}pack, {images} maps of {channels} channels, {name}", partial(pack, name, images, channels, size, device), 9, True))
    return found
