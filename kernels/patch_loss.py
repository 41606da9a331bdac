"""Squared error against patches normalised one by one, forward and backward, without writing a normalised image.

A program takes one patch: reads it once (in blocks, and thrice, where it has more than BLOCK values), and leaves its mean, 1 / deviation, error and what it
counts for. One program then adds these in a fixed order. Backward makes the target again from the mean and the deviation.
"""

import triton
import triton.language as tl

_MOST = 4096


@triton.jit
def _places(e, stride_c, stride_h, stride_w, EDGE: tl.constexpr):
    """Offset of value e of a patch, channel by channel, row by row. int64 block"""
    rest = e % (EDGE * EDGE)
    return (e // (EDGE * EDGE)).to(tl.int64) * stride_c + (rest // EDGE).to(tl.int64) * stride_h + (rest % EDGE).to(tl.int64) * stride_w


@triton.jit
def _corner(patch, rows, columns, stride_b, stride_h, stride_w, EDGE: tl.constexpr):
    """Offset of a patch; patch int64."""
    line = patch // columns
    return line // rows * stride_b + line % rows * EDGE * stride_h + patch % columns * EDGE * stride_w


@triton.jit(do_not_specialize=["rows", "columns"])
def _forward_kernel(predicted, predicted_b, predicted_c, predicted_h, predicted_w, images, images_b, images_c, images_h, images_w, active, min_std, flat_std, eps,
                    stats, rows, columns, values, EDGE: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """predicted, images [B, C, H, W], any strides; active uint8 [B, Gh, Gw]; stats float32 [B * Gh * Gw, 4]: mean, 1 / deviation, error, counts + 2 * flat"""
    patch = tl.program_id(0).to(tl.int64)
    hidden = tl.load(active + patch) == 0
    image = images + _corner(patch, rows, columns, images_b, images_h, images_w, EDGE)
    guess = predicted + _corner(patch, rows, columns, predicted_b, predicted_h, predicted_w, EDGE)
    e = tl.arange(0, BLOCK)
    size = tl.zeros((1,), tl.float32) + values
    if WHOLE:
        valid = (e < values) & hidden
        x = tl.load(image + _places(e, images_c, images_h, images_w, EDGE), mask=valid, other=0.0).to(tl.float32)
        mean = tl.div_rn(tl.sum(x, 0)[None], size)
        centred = tl.where(valid, x - mean, 0.0)
        variance = tl.div_rn(tl.sum(centred * centred, 0)[None], size)
        scale = tl.div_rn(tl.zeros_like(variance) + 1.0, tl.sqrt_rn(variance + eps))
        y = tl.load(guess + _places(e, predicted_c, predicted_h, predicted_w, EDGE), mask=valid, other=0.0).to(tl.float32)
        difference = y - centred * scale
        total = difference * difference
    else:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, values, BLOCK):
            valid = (start + e < values) & hidden
            total += tl.load(image + _places(start + e, images_c, images_h, images_w, EDGE), mask=valid, other=0.0).to(tl.float32)
        mean = tl.div_rn(tl.sum(total, 0)[None], size)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, values, BLOCK):
            valid = (start + e < values) & hidden
            x = tl.load(image + _places(start + e, images_c, images_h, images_w, EDGE), mask=valid, other=0.0).to(tl.float32)
            centred = tl.where(valid, x - mean, 0.0)
            total += centred * centred
        variance = tl.div_rn(tl.sum(total, 0)[None], size)
        scale = tl.div_rn(tl.zeros_like(variance) + 1.0, tl.sqrt_rn(variance + eps))
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, values, BLOCK):
            valid = (start + e < values) & hidden
            x = tl.load(image + _places(start + e, images_c, images_h, images_w, EDGE), mask=valid, other=0.0).to(tl.float32)
            y = tl.load(guess + _places(start + e, predicted_c, predicted_h, predicted_w, EDGE), mask=valid, other=0.0).to(tl.float32)
            difference = tl.where(valid, y - (x - mean) * scale, 0.0)
            total += difference * difference
    error = tl.div_rn(tl.sum(total, 0)[None], size)
    deviation = tl.sqrt_rn(variance)
    code = (hidden & (deviation >= min_std)).to(tl.float32) + 2.0 * (hidden & (deviation < flat_std)).to(tl.float32)
    place = stats + patch * 4 + tl.arange(0, 1)
    tl.store(place, mean)
    tl.store(place + 1, scale)
    tl.store(place + 2, error)
    tl.store(place + 3, code)


@triton.jit
def _join_kernel(stats, sums, patches, BLOCK: tl.constexpr):
    """sums float32 [4]: error and number of the patches that count, error and number of the flat ones."""
    error, number = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    flat_error, flat_number = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(0, patches, BLOCK):
        patch = (start + tl.arange(0, BLOCK)).to(tl.int64)
        code = tl.load(stats + patch * 4 + 3, mask=patch < patches, other=0.0)
        one = tl.load(stats + patch * 4 + 2, mask=patch < patches, other=0.0).to(tl.float64)
        counts, flat = (code == 1.0) | (code == 3.0), code >= 2.0
        error += tl.where(counts, one, 0.0)
        number += tl.where(counts, 1.0, 0.0)
        flat_error += tl.where(flat, one, 0.0)
        flat_number += tl.where(flat, 1.0, 0.0)
    tl.store(sums, tl.sum(error, 0).to(tl.float32))
    tl.store(sums + 1, tl.sum(number, 0).to(tl.float32))
    tl.store(sums + 2, tl.sum(flat_error, 0).to(tl.float32))
    tl.store(sums + 3, tl.sum(flat_number, 0).to(tl.float32))


@triton.jit(do_not_specialize=["rows", "columns"])
def _backward_kernel(grad, predicted, predicted_b, predicted_c, predicted_h, predicted_w, images, images_b, images_c, images_h, images_w, stats, out, out_b, out_c,
                     out_h, out_w, rows, columns, values, EDGE: tl.constexpr, BLOCK: tl.constexpr):
    """out [B, C, H, W]: the gradient of sums[0] in predicted, times grad float32 [4] at 0."""
    blocks = tl.cdiv(values, BLOCK)
    patch = (tl.program_id(0) // blocks).to(tl.int64)
    e = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(stats + patch * 4 + 3 + tl.arange(0, 1))
    counts = (code == 1.0) | (code == 3.0)
    valid = (e < values) & counts
    image = images + _corner(patch, rows, columns, images_b, images_h, images_w, EDGE)
    guess = predicted + _corner(patch, rows, columns, predicted_b, predicted_h, predicted_w, EDGE)
    x = tl.load(image + _places(e, images_c, images_h, images_w, EDGE), mask=valid, other=0.0).to(tl.float32)
    y = tl.load(guess + _places(e, predicted_c, predicted_h, predicted_w, EDGE), mask=valid, other=0.0).to(tl.float32)
    target = (x - tl.load(stats + patch * 4)) * tl.load(stats + patch * 4 + 1)
    slope = tl.where(valid, (y - target) * (2.0 / values * tl.load(grad)), 0.0)
    place = out + _corner(patch, rows, columns, out_b, out_h, out_w, EDGE) + _places(e, out_c, out_h, out_w, EDGE)
    tl.store(place, slope.to(out.dtype.element_ty), mask=e < values)


def _launch(values):
    block = min(_MOST, triton.next_power_of_2(values))
    return block, min(8, max(1, block // 256))


def forward(predicted, images, active, edge, min_std, flat_std, eps, stats, sums):
    """Fill stats float32 [B * Gh * Gw, 4] and sums float32 [4]; active uint8 [B, Gh, Gw], contiguous, 0 = hidden."""
    _, rows, columns = active.shape
    patches, values = active.numel(), images.shape[1] * edge * edge
    block, warps = _launch(values)
    if patches:
        _forward_kernel[(patches,)](predicted, *predicted.stride(), images, *images.stride(), active, min_std, flat_std, eps, stats, rows, columns, values, EDGE=edge,
                                    WHOLE=values <= block, BLOCK=block, num_warps=warps)
    _join_kernel[(1,)](stats, sums, patches, BLOCK=1024, num_warps=8)


def backward(grad, predicted, images, stats, rows, columns, edge, out):
    """Fill out [B, C, H, W] from grad float32 [4]."""
    patches, values = stats.shape[0], images.shape[1] * edge * edge
    if not out.numel():
        return
    block, warps = _launch(values)
    _backward_kernel[(patches * triton.cdiv(values, block),)](grad, predicted, *predicted.stride(), images, *images.stride(), stats, out, *out.stride(), rows, columns,
                                                              values, EDGE=edge, BLOCK=block, num_warps=warps)


def compile_cases():
    """(name, kernel, signature, constants, options) of the variants for usual images."""

    def strided(name, kind):
        return {name: f"*{kind}", **{f"{name}_{axis}": "i32" for axis in "bchw"}}

    size = {"rows": "i32", "columns": "i32", "values": "i32"}
    for kind in ("fp32", "bf16", "fp16"):
        for images, values, edge in ((("fp32", 1024, 32), (kind, 3072, 32), ("fp32", 12288, 64)) if kind == "bf16" else (("fp32", 1024, 32),)):
            block, warps = _launch(values)
            options, constants = {"num_warps": warps}, {"EDGE": edge, "BLOCK": block}
            fixed = {"predicted_w": 1, "images_w": 1} if values == 1024 else {}
            forward_types = {**strided("predicted", kind), **strided("images", images), "active": "*u8", "min_std": "fp32", "flat_std": "fp32", "eps": "fp32",
                             "stats": "*fp32", **size}
            backward_types = {"grad": "*fp32", **strided("predicted", kind), **strided("images", images), "stats": "*fp32", **strided("out", kind), **size}
            for name, kernel, types, more in (("forward", _forward_kernel, forward_types, {"WHOLE": values <= block}), ("backward", _backward_kernel, backward_types, {})):
                yield f"{name} {kind} {values}", kernel, {k: v for k, v in types.items() if k not in fixed}, {**constants, **fixed, **more}, options
    yield "join", _join_kernel, {"stats": "*fp32", "sums": "*fp32", "patches": "i32"}, {"BLOCK": 1024}, {"num_warps": 8}
