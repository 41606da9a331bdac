"""Quantised coverage of each patch, and which patches are inside; integers in int64 from the first sum on.

A program takes up to 256 patches of one image and walks over their pixels row by row, so that neighbouring lanes read neighbouring pixels and nothing is
reduced before the end. Where it sees the whole grid it also decides which patch a region claims that reaches none; larger grids take a second launch.
"""

import triton
import triton.language as tl

MOST_PATCHES = 256


@triton.jit
def quantised(value, BOOL: tl.constexpr):
    """round(255 * value), half to even, clamped to [0, 255], as int64. NaN gives 0."""
    if BOOL:
        return value.to(tl.int64) * 255
    else:
        wide = value if value.dtype == tl.float64 else value.to(tl.float32)
        scaled = tl.minimum(tl.maximum(wide * 255, 0), 255)
        # By comparison, not by adding 1.5 * 2^23, which a compiler may join with the product.
        floor = scaled.to(tl.int32)
        rest = scaled - floor.to(scaled.dtype)
        up = (rest > 0.5) | ((rest == 0.5) & (floor % 2 == 1))
        return (floor + up.to(tl.int32)).to(tl.int64)


@triton.jit
def patch_sums(region, stride_h, stride_w, patch, patches, columns, edge_h, edge_w, BOOL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_X: tl.constexpr):
    """Sums over the patches `patch` of one image whose first pixel is `region`. int64 [BLOCK_P]"""
    row = (patch // columns).to(tl.int64) * edge_h
    column = (patch % columns).to(tl.int64) * edge_w
    line = region + row * stride_h + column * stride_w
    total = tl.zeros((BLOCK_P, BLOCK_X), tl.int64)
    for _ in range(edge_h):
        for start in range(0, edge_w, BLOCK_X):
            x = start + tl.arange(0, BLOCK_X)
            valid = (patch < patches)[:, None] & (x < edge_w)[None, :]
            value = tl.load(line[:, None] + x.to(tl.int64)[None, :] * stride_w, mask=valid, other=0)
            if not BOOL:
                tl.device_assert(value == value, "region_coverage: region contains NaN. Replace it, e.g. with torch.nan_to_num.")
            total += quantised(value, BOOL)
        line += stride_h
    return tl.sum(total, 1)


@triton.jit
def claimed(cover, inside, patch, patches):
    """The best-covered patch where none is inside and one is covered at all, the lowest on ties; -1 elsewhere. Scalar int32."""
    seen = tl.where(patch < patches, cover, -1)
    best = tl.max(seen, 0)
    reached = tl.max(inside.to(tl.int32), 0)
    where = tl.min(tl.where(seen == best, patch, 0x7FFFFFFF), 0)
    return tl.where((reached == 0) & (best > 0), where, -1)


@triton.jit(do_not_specialize=["threshold"])
def _cover_kernel(region, stride_b, stride_h, stride_w, threshold, inside, cover, patches, columns, edge_h, edge_w,
                  BOOL: tl.constexpr, WHOLE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_X: tl.constexpr):
    """region [B, H, W], any strides; inside uint8 [B, L] and cover int64 [B, L], contiguous."""
    blocks = tl.cdiv(patches, BLOCK_P)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    patch = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    total = patch_sums(region + image * stride_b, stride_h, stride_w, patch, patches, columns, edge_h, edge_w, BOOL, BLOCK_P, BLOCK_X)
    reached = (total >= threshold) & (patch < patches)
    if WHOLE:
        reached = reached | (patch == claimed(total, reached, patch, patches))
    tl.store(cover + image * patches + patch, total, mask=patch < patches)
    tl.store(inside + image * patches + patch, reached.to(tl.uint8), mask=patch < patches)


@triton.jit
def _claim_kernel(inside, cover, patches, BLOCK: tl.constexpr):
    """One program per image of a large grid."""
    image = tl.program_id(0).to(tl.int64)
    best, where, reached = tl.full([], -1, tl.int64), tl.full([], -1, tl.int32), tl.full([], 0, tl.int32)
    for start in range(0, patches, BLOCK):
        patch = start + tl.arange(0, BLOCK)
        found = tl.load(cover + image * patches + patch, mask=patch < patches, other=-1)
        reached = tl.maximum(reached, tl.max(tl.load(inside + image * patches + patch, mask=patch < patches, other=0).to(tl.int32), 0))
        top = tl.max(found, 0)
        place = tl.min(tl.where(found == top, patch, 0x7FFFFFFF), 0)
        where = tl.where(top > best, place, where)
        best = tl.maximum(best, top)
    tl.store(inside + image * patches + where, 1, mask=(reached == 0) & (best > 0))


def _blocks(patches, edge_w):
    block_p = min(MOST_PATCHES, triton.next_power_of_2(patches))
    block_x = min(triton.next_power_of_2(edge_w), 64, max(1, 4096 // block_p))
    return block_p, block_x, min(8, max(1, block_p * block_x // 512))


def region_coverage(region, threshold, inside, cover):
    """Fill inside (bool) and cover (int64) [B, Gh, Gw], contiguous, from region [B, H, W]; NaN is a device-side assertion.

    region: float32, bfloat16, float16, float64, or uint8 that holds bools.
    """
    batch, rows, columns = cover.shape
    patches, edge_h, edge_w = rows * columns, region.shape[1] // max(rows, 1), region.shape[2] // max(columns, 1)
    if not cover.numel():
        return
    block_p, block_x, warps = _blocks(patches, edge_w)
    blocks = triton.cdiv(patches, block_p)
    _cover_kernel[(batch * blocks,)](region, *region.stride(), threshold, inside, cover, patches, columns, edge_h, edge_w, BOOL=not region.is_floating_point(),
                                     WHOLE=blocks == 1, BLOCK_P=block_p, BLOCK_X=block_x, num_warps=warps, debug=True, sanitize_overflow=False)
    if blocks > 1:
        _claim_kernel[(batch,)](inside, cover, patches, BLOCK=1024, num_warps=4)


def compile_cases():
    """(name, kernel, signature, constants, options) of every variant that is launched."""
    for kind in ("fp32", "bf16", "fp16", "fp64", "u8"):
        for patches, edge in ((49, 32), (196, 16), (4096, 7)) if kind in ("fp32", "u8") else ((49, 32),):
            block_p, block_x, warps = _blocks(patches, edge)
            signature = {"region": f"*{kind}", "stride_b": "i32", "stride_h": "i32", "stride_w": "i32", "threshold": "i64", "inside": "*u8", "cover": "*i64",
                         "patches": "i32", "columns": "i32", "edge_h": "i32", "edge_w": "i32"}
            constants = {"BOOL": kind == "u8", "WHOLE": patches <= block_p, "BLOCK_P": block_p, "BLOCK_X": block_x}
            for unit in (False, True) if patches == 49 else (True,):
                fixed = {**constants, "stride_w": 1} if unit else constants
                yield (f"{kind} {patches} patches of {edge}{' rows' if unit else ''}", _cover_kernel, {k: v for k, v in signature.items() if k not in fixed}, fixed,
                       {"num_warps": warps, "debug": True, "sanitize_overflow": False})
    yield "claim", _claim_kernel, {"inside": "*u8", "cover": "*i64", "patches": "i32"}, {"BLOCK": 1024}, {"num_warps": 4}
