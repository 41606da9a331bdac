"""Philox4x32-10 (Salmon et al., SC 2011), integers only, so the words equal those of every other backend.

`philox_word` is what the sampler calls; a lane asks for one word and computes its whole counter, four times the least work,
which keeps the order of the lanes free. Written out instead of `tl.philox`, whose word size follows the counter's type.
"""

import triton
import triton.language as tl


@triton.jit
def philox_word(number, image, epoch, tail, seed):
    """Word `number % 4` of the counter (number // 4, image, epoch, tail) under the 64-bit key `seed`.

    number: int32 block; image: int64 scalar; epoch, tail: scalars; seed: signed 64-bit scalar. Returns a uint32 block.
    """
    low_word = 0xFFFFFFFF
    c0 = (number // 4).to(tl.uint32)
    c1 = tl.zeros_like(c0) + (image & low_word).to(tl.uint32)
    c2 = tl.zeros_like(c0) + (epoch.to(tl.int64) & low_word).to(tl.uint32)
    c3 = tl.zeros_like(c0) + (tail.to(tl.int64) & low_word).to(tl.uint32)
    k0 = seed.to(tl.int64) & low_word
    k1 = (seed.to(tl.int64) >> 32) & low_word
    for _ in tl.static_range(10):
        first = c0.to(tl.uint64) * 0xD2511F53
        second = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (second >> 32).to(tl.uint32) ^ c1 ^ k0.to(tl.uint32)
        c2 = (first >> 32).to(tl.uint32) ^ c3 ^ k1.to(tl.uint32)
        c1 = second.to(tl.uint32)
        c3 = first.to(tl.uint32)
        k0 = (k0 + 0x9E3779B9) & low_word
        k1 = (k1 + 0xBB67AE85) & low_word
    word = number % 4
    return tl.where(word < 2, tl.where(word == 0, c0, c1), tl.where(word == 2, c2, c3))


@triton.jit(do_not_specialize=["epoch", "tail", "seed", "count"])
def _random_words_kernel(ids, stride, epoch, tail, seed, out, count, BLOCK: tl.constexpr):
    """One program per id and block of words. ids int64 [B]; out int64 [B, count], contiguous."""
    blocks = tl.cdiv(count, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    number = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    name = tl.load(ids + image * stride)
    tl.device_assert((name >= 0) & (name <= 0xFFFFFFFF), "random_words: ids must be integers in [0, 2**32)")
    word = philox_word(number, name, epoch, tail, seed).to(tl.int64)
    tl.store(out + image * count + number, word, mask=number < count)


def random_words(ids, seed, epoch, view, stream, out):
    """Fill out int64 [B, n] with the words of ids int64 [B]; an id out of range is a device-side assertion."""
    batch, count = out.shape
    if not out.numel():
        return
    block = min(1024, max(32, triton.next_power_of_2(count)))
    grid = (batch * triton.cdiv(count, block),)
    _random_words_kernel[grid](ids, ids.stride(0), epoch, (stream << 16) | view, seed, out, count, BLOCK=block, num_warps=max(1, block // 128), debug=True,
                               sanitize_overflow=False)


def compile_cases():
    """(name, kernel, signature, constants, options) of every variant that is launched."""
    signature = {"ids": "*i64", "stride": "i32", "epoch": "i64", "tail": "i64", "seed": "i64", "out": "*i64", "count": "i32"}
    for block in (32, 1024):
        yield f"random_words {block}", _random_words_kernel, signature, {"BLOCK": block}, {"num_warps": max(1, block // 128), "debug": True, "sanitize_overflow": False}
