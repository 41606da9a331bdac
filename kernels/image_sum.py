"""Sums over the visible positions of each image, and their way back.

The tiles of an image lie behind each other, so an image is a run of rows [R, C] of channels-last memory; a program takes one image and some channels.
"""

import triton
import triton.language as tl


@triton.jit
def _image_sum_kernel(x, offsets, out, channels, positions, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """x [T, t * t, C]; offsets int32 [B + 1]; out float32 [B, C]"""
    blocks = tl.cdiv(channels, BLOCK_C)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    first = tl.load(offsets + image).to(tl.int64) * positions
    last = tl.load(offsets + image + 1).to(tl.int64) * positions
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        valid = (r < last)[:, None] & (c < channels)[None, :]
        total += tl.load(x + r[:, None] * channels + c[None, :], mask=valid, other=0.0).to(tl.float32)
    tl.store(out + image * channels + c, tl.sum(total, 0), mask=c < channels)


def image_sum(x, offsets, out):
    """Fill out float32 [B, C] from x [T, C, t, t], channels-last, and offsets int32 [B + 1]."""
    batch, channels = out.shape
    if not out.numel():
        return
    block_r, block_c = _blocks(channels)
    grid = (batch * triton.cdiv(channels, block_c),)
    _image_sum_kernel[grid](x, offsets, out, channels, x.shape[2] * x.shape[3], BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4)


def _blocks(channels):
    block_c = min(64, triton.next_power_of_2(channels))
    return 2048 // block_c if block_c >= 16 else 128, block_c


def compile_cases():
    """(name, kernel, signature, constants, options) of the variants for usual maps."""
    for kind in ("fp32", "bf16", "fp16"):
        block_r, block_c = _blocks(256)
        yield (kind, _image_sum_kernel, {"x": f"*{kind}", "offsets": "*i32", "out": "*fp32", "channels": "i32", "positions": "i32"},
               {"BLOCK_R": block_r, "BLOCK_C": block_c}, {"num_warps": 4})
