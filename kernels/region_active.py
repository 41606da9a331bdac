"""From regions to masks in one launch, for grids of at most 64 patches: the masks of region_coverage followed by sample_active, bit for bit.

One program per image: sums and strata never leave the registers, and every key is compared with every other at once, which is what bounds the grid.
"""

import triton
import triton.language as tl

from .philox import philox_word
from .region_coverage import claimed, patch_sums
from .sample_active import STREAM_ROUNDING

MOST_PATCHES = 64


@triton.jit(do_not_specialize=["threshold", "epoch", "view", "seed", "outside", "within", "without", "total", "stream"])
def _region_active_kernel(region, stride_b, stride_h, stride_w, threshold, ids, stride_i, epoch, view, seed, outside, within, without, total, stream, inside, active,
                          patches, columns, edge_h, edge_w, BOOL: tl.constexpr, TOTAL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_X: tl.constexpr):
    """region [B, H, W], any strides; ids int64 [B]; outside, within, without: Q32 shares; inside, active uint8 [B, L], contiguous"""
    image = tl.program_id(0).to(tl.int64)
    patch = tl.arange(0, BLOCK_P)
    valid = patch < patches
    name = tl.load(ids + image * stride_i)
    tl.device_assert((name >= 0) & (name <= 0xFFFFFFFF), "region_active: ids must be integers in [0, 2**32)")
    cover = patch_sums(region + image * stride_b, stride_h, stride_w, patch, patches, columns, edge_h, edge_w, BOOL, BLOCK_P, BLOCK_X)
    reached = (cover >= threshold) & valid
    reached = reached | (patch == claimed(cover, reached, patch, patches))
    count = tl.sum(reached.to(tl.int32), 0)
    stratum = reached.to(tl.int32)
    if not TOTAL:
        stratum = tl.where(count == 0, 2, stratum)
    key = philox_word(patch, name, epoch, view, seed)
    fellow = (stratum[:, None] == stratum[None, :]) & valid[None, :]
    sooner = (key[None, :] < key[:, None]) | ((key[None, :] == key[:, None]) & (patch[None, :] < patch[:, None]))
    rank = tl.sum((fellow & sooner).to(tl.int32), 1)
    if TOTAL:
        n_in, all_hidden = count.to(tl.int64), total.to(tl.int64)
        exact = n_in * within.to(tl.int64)
        chance = philox_word(tl.zeros_like(patch), name, epoch, view.to(tl.int64) + (stream.to(tl.int64) << 16), seed).to(tl.int64)
        wanted = (exact >> 32) + (chance < (exact & 0xFFFFFFFF)).to(tl.int64)
        hidden_in = tl.minimum(tl.maximum(wanted, all_hidden - (patches - n_in)), tl.minimum(n_in, all_hidden))
        hidden = tl.where(reached, hidden_in, all_hidden - hidden_in)
    else:
        size = tl.sum(fellow.to(tl.int32), 1)
        amount = tl.where(stratum == 0, outside.to(tl.int64), tl.where(stratum == 1, within.to(tl.int64), without.to(tl.int64)))
        product = size.to(tl.int64) * amount
        chance = philox_word(stratum, name, epoch, view + (STREAM_ROUNDING << 16), seed).to(tl.int64)
        hidden = (product >> 32) + (chance < (product & 0xFFFFFFFF)).to(tl.int64)
    tl.store(inside + image * patches + patch, reached.to(tl.uint8), mask=valid)
    tl.store(active + image * patches + patch, (rank >= hidden).to(tl.uint8), mask=valid)


def _blocks(patches, edge_w):
    block_p = triton.next_power_of_2(patches)
    return block_p, min(triton.next_power_of_2(edge_w), 64, max(1, 4096 // block_p))


def region_active(region, threshold, rule, seed, ids, epoch, view, inside, active):
    """Fill inside and active (uint8 that hold bools, [B, Gh, Gw], contiguous). NaN and ids out of range are device-side assertions.

    region: floating, or uint8 that holds bools [B, H, W]; rule: the five numbers of `mwm.ops.region_active`; the grid has at most MOST_PATCHES patches.
    """
    batch, rows, columns = inside.shape
    if not inside.numel():
        return
    edge_h, edge_w = region.shape[1] // rows, region.shape[2] // columns
    block_p, block_x = _blocks(rows * columns, edge_w)
    outside, within, without, total, stream = rule
    _region_active_kernel[(batch,)](region, *region.stride(), threshold, ids, ids.stride(0), epoch, view, seed, outside, within, without, total, stream, inside, active,
                                    rows * columns, columns, edge_h, edge_w, BOOL=not region.is_floating_point(), TOTAL=total >= 0, BLOCK_P=block_p, BLOCK_X=block_x,
                                    num_warps=4, debug=True, sanitize_overflow=False)


def compile_cases():
    """(name, kernel, signature, constants, options) of the variants for usual regions."""
    wide = dict.fromkeys(("threshold", "epoch", "view", "seed", "outside", "within", "without", "total", "stream"), "i64")
    narrow = dict.fromkeys(("stride_b", "stride_h", "stride_w", "stride_i", "patches", "columns", "edge_h", "edge_w"), "i32")
    block_p, block_x = _blocks(49, 32)
    for kind in ("fp32", "bf16", "fp16", "fp64", "u8"):
        for total in (True, False) if kind == "fp32" else (True,):
            yield (f"{kind} {'total' if total else 'shares'}", _region_active_kernel, {"region": f"*{kind}", "ids": "*i64", "inside": "*u8", "active": "*u8", **wide, **narrow},
                   {"BOOL": kind == "u8", "TOTAL": total, "BLOCK_P": block_p, "BLOCK_X": block_x}, {"num_warps": 4, "debug": True, "sanitize_overflow": False})
