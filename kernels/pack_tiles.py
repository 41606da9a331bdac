"""Dense map to packed tiles and back, bit for bit: values travel as integers of their size, so that every dtype is one of four.

A program copies some positions and channels of one tile; channels lie side by side in memory on the packed side always, and on the dense side
in channels-last maps. Unpacking goes over the patches of the map, so that hidden ones are filled by the same launch.
"""

import torch
import triton
import triton.language as tl

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _pack_kernel(x, stride_b, stride_c, stride_h, stride_w, coords, out, channels, edge, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """x [B, C, H, W], any strides; coords int32 [T, 3]; out [T, t * t, C], contiguous."""
    positions = edge * edge
    blocks_c = tl.cdiv(channels, BLOCK_C)
    blocks = blocks_c * tl.cdiv(positions, BLOCK_P)
    tile = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    p = block // blocks_c * BLOCK_P + tl.arange(0, BLOCK_P)
    c = (block % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    image, row, column = tl.load(coords + tile * 3).to(tl.int64), tl.load(coords + tile * 3 + 1).to(tl.int64), tl.load(coords + tile * 3 + 2).to(tl.int64)
    place = image * stride_b + (row * edge + p // edge) * stride_h + (column * edge + p % edge) * stride_w
    valid = (p < positions)[:, None] & (c < channels)[None, :]
    value = tl.load(x + place[:, None] + (c * stride_c)[None, :], mask=valid)
    tl.store(out + ((tile * edge * edge + p) * channels)[:, None] + c[None, :], value, mask=valid)


@triton.jit(do_not_specialize=["fill"])
def _unpack_kernel(tiles, stride_t, stride_c, stride_h, stride_w, slots, fill, out, channels, edge, columns, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """tiles [T, C, t, t], any strides; slots int32 [B, Gh, Gw]; out [B, Gh * t, Gw * t, C], contiguous."""
    positions = edge * edge
    blocks_c = tl.cdiv(channels, BLOCK_C)
    blocks = blocks_c * tl.cdiv(positions, BLOCK_P)
    patch = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    p = block // blocks_c * BLOCK_P + tl.arange(0, BLOCK_P)
    c = (block % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    slot = tl.load(slots + patch).to(tl.int64)
    valid = (p < positions)[:, None] & (c < channels)[None, :]
    place = slot * stride_t + (p // edge).to(tl.int64) * stride_h + (p % edge).to(tl.int64) * stride_w
    value = tl.load(tiles + place[:, None] + (c * stride_c)[None, :], mask=valid & (slot >= 0))
    value = tl.where(slot >= 0, value, fill.to(value.dtype))
    line = patch // columns * edge + p // edge  # rows of patches follow each other from image to image
    place = (line * columns + patch % columns) * edge + p % edge
    tl.store(out + (place * channels)[:, None] + c[None, :], value, mask=valid)


def _blocks(channels, positions, most=1024):
    block_c = min(128, triton.next_power_of_2(channels))
    return min(triton.next_power_of_2(positions), most // block_c), block_c


def _bits(x):
    return x.resolve_conj().view(_BITS[x.element_size()])


def pack_tiles(x, coords, out):
    """Fill out [T, C, t, t], channels-last, from x [B, C, H, W] at the tiles of coords int32 [T, 3]."""
    tiles, channels, edge, _ = out.shape
    if not out.numel():
        return
    block_p, block_c = _blocks(channels, edge * edge)
    grid = (tiles * triton.cdiv(channels, block_c) * triton.cdiv(edge * edge, block_p),)
    _pack_kernel[grid](_bits(x), *x.stride(), coords, _bits(out), channels, edge, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4)


def unpack_tiles(tiles, slots, fill, out):
    """Fill out [B, C, Gh * t, Gw * t], channels-last, from tiles [T, C, t, t] at slots int32 [B, Gh, Gw], with `fill` where a slot is -1."""
    batch, rows, columns = slots.shape
    _, channels, edge, _ = tiles.shape
    if not out.numel():
        return
    fill = int(torch.full((), fill, dtype=out.dtype, device="cpu").view(_BITS[out.element_size()]))
    block_p, block_c = _blocks(channels, edge * edge)
    grid = (batch * rows * columns * triton.cdiv(channels, block_c) * triton.cdiv(edge * edge, block_p),)
    _unpack_kernel[grid](_bits(tiles), *tiles.stride(), slots, fill, _bits(out), channels, edge, columns, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4)


def compile_cases():
    """(name, kernel, signature, constants, options) of the variants for usual maps."""
    sizes = {"channels": "i32", "edge": "i32"}
    strides = {"stride_c": "i32", "stride_h": "i32", "stride_w": "i32"}
    for kind in ("i8", "i16", "i32", "i64"):
        for channels, edge in ((1, 32), (512, 1), (256, 8)) if kind == "i16" else ((256, 8),):
            block_p, block_c = _blocks(channels, edge * edge)
            constants = {"BLOCK_P": block_p, "BLOCK_C": block_c, **({"stride_c": 1} if channels > 1 else {"stride_w": 1, "channels": 1}), **({"edge": 1} if edge == 1 else {})}
            pack = {"x": f"*{kind}", "stride_b": "i32", **strides, "coords": "*i32", "out": f"*{kind}", **sizes}
            unpack = {"tiles": f"*{kind}", "stride_t": "i32", **strides, "slots": "*i32", "fill": "i32", "out": f"*{kind}", **sizes, "columns": "i32"}
            for name, kernel, signature in (("pack", _pack_kernel, pack), ("unpack", _unpack_kernel, unpack)):
                yield f"{name} {kind} C = {channels}, t = {edge}", kernel, {k: v for k, v in signature.items() if k not in constants}, constants, {"num_warps": 4}
