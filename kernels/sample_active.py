"""Stratified sampling of visible patches: Philox keys, ranks by counting, exact counts; integers only, equal to every other backend bit for bit.

A lane holds one patch and compares its key with those of all patches of its image, 16 at a time, which are drawn again rather than stored. Each
lane also counts its stratum and draws its rounding word, so the number of strata is free and one launch makes the masks of a batch.
"""

import triton
import triton.language as tl

from .philox import philox_word

STREAM_KEY, STREAM_ROUNDING, STREAM_WEIGHT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def negative_log2(word, more, table):
    """-log2((word * 2^32 + more) / 2^64) * 2^32 by 256 chords, 0 read as 1. int64 blocks; table int64 [257]"""
    more = tl.where((word == 0) & (more == 0), 1, more)
    bits = (word.to(tl.uint64) << 32) | more.to(tl.uint64)
    zeros = tl.zeros_like(word)
    for step in tl.static_range(6):
        empty = (bits >> (64 - (32 >> step))) == 0
        zeros += tl.where(empty, 32 >> step, 0)
        bits = tl.where(empty, bits << (32 >> step), bits)
    index = ((bits >> 55) & 0xFF).to(tl.int64)
    fraction = ((bits >> 23) & 0xFFFFFFFF).to(tl.int64)
    low = tl.load(table + index)
    log2 = low + (((tl.load(table + index + 1) - low) * fraction) >> 32)
    return ((zeros + 1) << 32) - log2


@triton.jit
def patch_key(patch, patches, image, epoch, view, seed, weights, stride_w, table, WEIGHTED: tl.constexpr):
    """Key of each patch: the lower, the sooner hidden. uint32 block, int64 where weighted; weights points at the image's first."""
    word = philox_word(patch, image, epoch, view, seed)
    if WEIGHTED:
        key = word.to(tl.int64)
        weight = tl.load(weights + patch.to(tl.int64) * stride_w, mask=patch < patches, other=0)
        more = philox_word(patch, image, epoch, view + (STREAM_WEIGHT << 16), seed).to(tl.int64)
        race = (negative_log2(key, more, table) << 16) // tl.maximum(weight, 1)
        return tl.where(weight > 0, race, key + (1 << 62))
    else:
        return word


@triton.jit
def hidden_of(stratum, size, valid, amounts, stride_s, image, epoch, view, seed, EXACT: tl.constexpr):
    """How many patches of its stratum each lane's image hides. int64 block"""
    amount = tl.load(amounts + stratum.to(tl.int64) * stride_s, mask=valid, other=0)
    if EXACT:
        return amount
    else:
        product = size.to(tl.int64) * amount
        chance = philox_word(stratum, image, epoch, view + (STREAM_ROUNDING << 16), seed).to(tl.int64)
        return (product >> 32) + (chance < (product & 0xFFFFFFFF)).to(tl.int64)


@triton.jit(do_not_specialize=["epoch", "view", "seed", "kinds"])
def _sample_kernel(strata, stride_b, stride_p, amounts, stride_a, stride_s, ids, stride_i, epoch, view, seed, weights, stride_v, stride_w, table, active, patches,
                   kinds, EXACT: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """One program per image and block of patches. strata integer [B, L]; amounts int64 [B, S]; ids int64 [B]; weights int64 [B, L]; active uint8 [B, L]"""
    blocks = tl.cdiv(patches, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    patch = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    name = tl.load(ids + image * stride_i)
    tl.device_assert((name >= 0) & (name <= 0xFFFFFFFF), "sample_active: ids must be integers in [0, 2**32)")
    strata += image * stride_b
    amounts += image * stride_a
    weights += image * stride_v
    given = tl.load(strata + patch.to(tl.int64) * stride_p, mask=patch < patches, other=0).to(tl.int64)
    tl.device_assert((given >= 0) & (given < kinds) | (patch >= patches), "sample_active: strata must lie in [0, S)")
    mine = given.to(tl.int32)
    key = patch_key(patch, patches, name, epoch, view, seed, weights, stride_w, table, WEIGHTED)
    if WEIGHTED:
        weight = tl.load(weights + patch.to(tl.int64) * stride_w, mask=patch < patches, other=0)
        tl.device_assert((weight >= 0) & (weight <= 65535), "sample_active: integer weights must be in [0, 65535]. Scale them.")
    size = tl.zeros((BLOCK,), tl.int32)
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, patches, CHUNK):
        other = start + tl.arange(0, CHUNK)
        theirs = tl.load(strata + other.to(tl.int64) * stride_p, mask=other < patches, other=0).to(tl.int32)
        rival = patch_key(other, patches, name, epoch, view, seed, weights, stride_w, table, WEIGHTED)
        fellow = (mine[:, None] == theirs[None, :]) & (other < patches)[None, :]
        sooner = (rival[None, :] < key[:, None]) | ((rival[None, :] == key[:, None]) & (other[None, :] < patch[:, None]))
        size += tl.sum(fellow.to(tl.int32), 1)
        rank += tl.sum((fellow & sooner).to(tl.int32), 1)
    valid = (patch < patches) & (given >= 0) & (given < kinds)
    hidden = hidden_of(mine, size, valid, amounts, stride_s, name, epoch, view, seed, EXACT)
    tl.store(active + image * patches + patch, (rank >= hidden).to(tl.uint8), mask=patch < patches)
    # Also the amounts of strata without a patch must make sense.
    for kind in range(kinds):
        amount = tl.load(amounts)
        amounts += stride_s
        if EXACT:
            members = tl.full([], 0, tl.int32)
            for start in range(0, patches, CHUNK):
                other = start + tl.arange(0, CHUNK)
                theirs = tl.load(strata + other.to(tl.int64) * stride_p, mask=other < patches, other=0).to(tl.int32)
                members += tl.sum(((theirs == kind) & (other < patches)).to(tl.int32), 0)
            tl.device_assert((amount >= 0) & (amount <= members), "sample_active: hidden must be between 0 and the number of patches of each stratum.")
        else:
            tl.device_assert((amount >= 0) & (amount <= 4294967296), "sample_active: ratio must be Q32 integers in [0, 2**32]. Use to_q32.")


def _blocks(patches):
    block = min(256, max(32, triton.next_power_of_2(patches)))
    return block, 16, min(8, max(1, block // 16))


def sample_active(strata, amounts, exact, seed, ids, epoch, view, weights, table, active):
    """Fill active (bool [B, Gh, Gw], contiguous). Out-of-range ids, strata, amounts and weights are device-side assertions.

    strata: integer or uint8 that holds bools, any strides [B, L]; amounts: int64 [S] or [B, S]; ids: int64 [B]; weights: int64 [B, L] or None;
    table: int64 [257], 2^32 * log2(1 + i / 256), read where there are weights.
    """
    batch, patches = strata.shape
    if not strata.numel():
        return
    block, chunk, warps = _blocks(patches)
    by_image = amounts.dim() == 2
    given = weights if weights is not None else table
    _sample_kernel[(batch * triton.cdiv(patches, block),)](
        strata, *strata.stride(), amounts, amounts.stride(0) if by_image else 0, amounts.stride(-1), ids, ids.stride(0), epoch, view, seed, given,
        *(given.stride() if weights is not None else (0, 0)), table, active, patches, amounts.shape[-1], EXACT=exact, WEIGHTED=weights is not None, BLOCK=block,
        CHUNK=chunk, num_warps=warps, debug=True, sanitize_overflow=False)


def compile_cases():
    """(name, kernel, signature, constants, options) of every variant that is launched."""
    for kind in ("i64", "i32", "i16", "u8"):
        signature = {"strata": f"*{kind}", "stride_b": "i32", "stride_p": "i32", "amounts": "*i64", "stride_a": "i32", "stride_s": "i32", "ids": "*i64",
                     "stride_i": "i32", "epoch": "i64", "view": "i64", "seed": "i64", "weights": "*i64", "stride_v": "i32", "stride_w": "i32", "table": "*i64",
                     "active": "*u8", "patches": "i32", "kinds": "i32"}
        for patches in (49, 196):
            for exact in (False, True):
                for weighted in (False, True):
                    if kind != "i64" and (exact, weighted, patches) != (True, True, 49):  # the dtype is cast at once
                        continue
                    block, chunk, warps = _blocks(patches)
                    yield (f"{kind} {patches} patches{' exact' if exact else ''}{' weighted' if weighted else ''}", _sample_kernel, signature,
                           {"EXACT": exact, "WEIGHTED": weighted, "BLOCK": block, "CHUNK": chunk}, {"num_warps": warps, "debug": True, "sanitize_overflow": False})
