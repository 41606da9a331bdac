"""How much of each patch a region covers, and which patches count as inside: integers, defined once for everybody."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from . import gpu, native, reference
from .backend import FLOATS, declare, resolve
from .registry import register

declare("region_coverage", cpu=(*FLOATS, torch.bool), cuda=(*FLOATS, torch.bool), triton=(*FLOATS, torch.bool), reference=(*FLOATS, torch.bool))


def region_coverage(
    region: Tensor, grid: tuple[int, int], *, min_cover: float = 0.25, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Sum the quantised region over each patch and decide which patches are inside.

    cover = sum over the patch of clamp(round(255 * region), 0, 255), half to even, in int64; the product is taken in float32
    (float64 for float64 regions). A patch is inside when cover >= ceil(min_cover * 255 * pixels). A non-empty region that
    reaches no patch claims its best-covered one, the lowest index on ties.

    Args:
        region: What the text names, 0 to 1. float32 | bfloat16 | float16 | float64 | bool, any strides [B, H, W]
        grid: (Gh, Gw); must divide (H, W).
        min_cover: Least covered share of an inside patch, in (0, 1], read as its decimal digits.
        backend: Forces an implementation; None picks the best.

    Returns:
        (inside, cover): bool [B, Gh, Gw] and int64 [B, Gh, Gw].

    Raises:
        ValueError: The region has NaN (on a GPU a device-side assertion) or the wrong size, or `min_cover` is out of range.
        BackendError: `backend` cannot run this input; the message lists the reasons.

    Deterministic, and equal on every backend.
    """
    rows, columns = grid
    share = _checked_share("region_coverage", region, rows, columns, min_cover)
    return _region_coverage(region, rows, columns, share.numerator, share.denominator, backend or "")


def coverage_threshold(op: str, region: Tensor, rows: int, columns: int, min_cover: float) -> int:
    """Least sum of an inside patch, ceil(min_cover * 255 * pixels); refuses what `region_coverage` refuses, in the name of `op`."""
    share = _checked_share(op, region, rows, columns, min_cover)
    return _threshold(region, rows, columns, share.numerator, share.denominator)


def _threshold(region: Tensor, rows: int, columns: int, numerator: int, denominator: int) -> int:
    pixels = (region.shape[1] // rows) * (region.shape[2] // columns)
    return -(-numerator * 255 * pixels // denominator)


def _checked_share(op: str, region: Tensor, rows: int, columns: int, min_cover: float) -> Fraction:
    if region.dim() != 3:
        raise ValueError(f"{op}: region must be [B, H, W], got {list(region.shape)}.")
    if rows < 1 or columns < 1 or region.shape[1] % rows or region.shape[2] % columns:
        raise ValueError(
            f"{op}: region must divide into the grid {rows} x {columns}, got H x W = {region.shape[1]} x {region.shape[2]}. "
            f"Resize the region to the image size."
        )
    if not 0 < min_cover <= 1:
        raise ValueError(f"{op}: min_cover must be in (0, 1], got {min_cover}.")
    return Fraction(repr(float(min_cover)))


def _implementation(
    region: Tensor, rows: int, columns: int, numerator: int, denominator: int, backend: str
) -> tuple[Tensor, Tensor]:
    name = resolve("region_coverage", backend, region)
    if name == "reference":
        return reference.region_coverage(region, rows, columns, numerator, denominator)
    inside, cover = _fake(region, rows, columns, numerator, denominator, backend)
    threshold = _threshold(region, rows, columns, numerator, denominator)
    if name == "triton":
        with gpu.guard(region):
            gpu.triton_kernels("region_coverage").region_coverage(gpu.as_bytes(region), threshold, gpu.as_bytes(inside), cover)
        return inside, cover
    views = native.view(region), threshold, native.view(inside), native.view(cover)
    if name == "cuda":
        with gpu.guard(region):
            gpu.cuda().region_coverage(*views, *gpu.launch(region))
    else:
        native.core().region_coverage(*views, native.threads())
    return inside, cover


def _fake(
    region: Tensor, rows: int, columns: int, numerator: int, denominator: int, backend: str
) -> tuple[Tensor, Tensor]:
    shape = (region.shape[0], rows, columns)
    return region.new_empty(shape, dtype=torch.bool), region.new_empty(shape, dtype=torch.int64)


_region_coverage = register(
    "region_coverage",
    "(Tensor region, SymInt rows, SymInt columns, SymInt numerator, SymInt denominator, str backend) -> (Tensor, Tensor)",
    _implementation,
    _fake,
)
