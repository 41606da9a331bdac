"""Kernels that compile_sm90.py must refuse, each for its own reason; without them a check that sees nothing would pass."""

import triton
import triton.language as tl


@triton.jit
def _wraps_kernel(x, out, step, BLOCK: tl.constexpr):
    place = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(out + place, tl.load(x + place))


@triton.jit
def _wraps_and_widens_kernel(x, out, step, BLOCK: tl.constexpr):
    place = (tl.program_id(0) * step).to(tl.int64) + tl.arange(0, BLOCK)
    tl.store(out + place, tl.load(x + place))


@triton.jit
def _spills_kernel(x, out, step, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * step + tl.arange(0, BLOCK)
    value = tl.load(x + place)
    tl.store(out + place, value * tl.sum(value, 0))


@triton.jit
def _fills_shared_memory_kernel(x, out, step, BLOCK: tl.constexpr):
    rows = tl.arange(0, 128).to(tl.int64)
    total = tl.zeros((128, BLOCK), tl.float32)
    for k in range(0, step, 64):
        a = tl.load(x + rows[:, None] * step + k + tl.arange(0, 64)[None, :])
        b = tl.load(x + (k + tl.arange(0, 64)).to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])
        total = tl.dot(a, b, total)
    tl.store(out + rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], total)


@triton.jit
def _has_a_type_error_kernel(x, out, step, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, 2 * BLOCK)))


def compile_cases():
    """One case for each reason."""
    for kernel, block, options in ((_wraps_kernel, 64, {"num_warps": 4}), (_wraps_and_widens_kernel, 64, {"num_warps": 4}), (_spills_kernel, 32768, {"num_warps": 1}),
                                   (_fills_shared_memory_kernel, 256, {"num_warps": 8, "num_stages": 8}), (_has_a_type_error_kernel, 64, {"num_warps": 4})):
        kind = "*fp16" if kernel is _fills_shared_memory_kernel else "*fp32"
        yield kernel.__name__, kernel, {"x": kind, "out": "*fp32", "step": "i32"}, {"BLOCK": block}, options
