"""Max and average pooling of packed tiles: windows see the neighbouring tiles, hidden ones as zero, the padding of the image as minus infinity (max) or zero.

A program takes some positions and channels; the backward asks, for each input position, the windows that see it, so nothing is added to one place twice.
"""

import triton
import triton.language as tl


@triton.jit
def _positions(coords, positions, channels, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """(q, valid, image, row, column, c): flat positions of tiles of HEIGHT x WIDTH, where they lie in the map, and channels. int64 blocks"""
    blocks = tl.cdiv(channels, BLOCK_C)
    q = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = (tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    valid = q < positions
    place = coords + q // (HEIGHT * WIDTH) * 3
    image = tl.load(place, mask=valid, other=0).to(tl.int64)
    row = tl.load(place + 1, mask=valid, other=0).to(tl.int64) * HEIGHT + q // WIDTH % HEIGHT
    column = tl.load(place + 2, mask=valid, other=0).to(tl.int64) * WIDTH + q % WIDTH
    return q, valid, image, row, column, c


@triton.jit
def _stored(slots, image, row, column, inside, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Flat position where (row, column) of the map is stored, negative where it is hidden or not inside. int64 block"""
    slot = tl.load(slots + (image * rows + row // HEIGHT) * columns + column // WIDTH, mask=inside, other=-1).to(tl.int64)
    place = (slot * HEIGHT + row % HEIGHT) * WIDTH + column % WIDTH
    return tl.where(slot >= 0, place, -1)


@triton.jit
def _divisor(out_row, out_column, height, width, left, right, top, bottom, divisor, KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr,
             STRIDE_W: tl.constexpr, WITH_PAD: tl.constexpr, FIXED: tl.constexpr):
    """Divisor of the windows, as torch's dense op has it. float32 block"""
    if FIXED:
        return tl.zeros_like(out_row).to(tl.float32) + divisor
    else:
        first_row, first_column = out_row * STRIDE_H - top, out_column * STRIDE_W - left
        last_row, last_column = tl.minimum(first_row + KH, height + bottom), tl.minimum(first_column + KW, width + right)
        if not WITH_PAD:
            first_row, first_column = tl.maximum(first_row, 0), tl.maximum(first_column, 0)
            last_row, last_column = tl.minimum(last_row, height), tl.minimum(last_column, width)
        return ((last_row - first_row) * (last_column - first_column)).to(tl.float32)


@triton.jit
def _forward_kernel(x, coords, slots, out, taps, positions, channels, rows, columns, left, right, top, bottom, divisor, pad_value, MAX: tl.constexpr,
                    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
                    WITH_PAD: tl.constexpr, FIXED: tl.constexpr, EDGE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """x [T, t, t, C]; out and taps (int16, max alone) [T, t / s, t / s, C]"""
    q, valid, image, out_row, out_column, c = _positions(coords, positions, channels, EDGE // STRIDE_H, EDGE // STRIDE_W, BLOCK_P, BLOCK_C)
    height, width = rows * EDGE, columns * EDGE
    channel = (c < channels)[None, :]
    best = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    winner = tl.full((BLOCK_P, BLOCK_C), -1, tl.int32)
    for tap in range(KH * KW):
        row = out_row * STRIDE_H - top + tap // KW * DILATION_H
        column = out_column * STRIDE_W - left + tap % KW * DILATION_W
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        place = _stored(slots, image, row, column, valid & inside, rows, columns, EDGE, EDGE)
        value = tl.load(x + place[:, None] * channels + c[None, :], mask=(place >= 0)[:, None] & channel, other=0.0).to(tl.float32)
        if MAX:
            padding = (row >= -top) & (row < height + bottom) & (column >= -left) & (column < width + right)
            value = tl.where(inside[:, None], value, tl.where(padding, pad_value, float("-inf"))[:, None])
            better = (value > best) | (value != value) | (tap == 0)
            winner = tl.where(better, tl.where(place >= 0, tap, -1)[:, None], winner)
            best = tl.where(better, value, best)
        else:
            best += value
    where = q[:, None] * channels + c[None, :]
    if MAX:
        tl.store(taps + where, winner.to(tl.int16), mask=valid[:, None] & channel)
    else:
        size = _divisor(out_row, out_column, height, width, left, right, top, bottom, divisor, KH, KW, STRIDE_H, STRIDE_W, WITH_PAD, FIXED)
        best = tl.div_rn(best, tl.zeros_like(best) + size[:, None])
    tl.store(out + where, best.to(out.dtype.element_ty), mask=valid[:, None] & channel)


@triton.jit
def _backward_kernel(grad, taps, coords, slots, out, positions, channels, rows, columns, left, right, top, bottom, divisor, MAX: tl.constexpr, KH: tl.constexpr,
                     KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
                     WITH_PAD: tl.constexpr, FIXED: tl.constexpr, EDGE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """grad and taps [T, t / s, t / s, C]; out [T, t, t, C]"""
    q, valid, image, row, column, c = _positions(coords, positions, channels, EDGE, EDGE, BLOCK_P, BLOCK_C)
    height, width = rows * EDGE, columns * EDGE
    channel = (c < channels)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in range(KH * KW):
        tap = KH * KW - 1 - step  # the windows in order of their outputs, as on the other backends: a sum of ninths depends on it
        first_row, first_column = row + top - tap // KW * DILATION_H, column + left - tap % KW * DILATION_W
        out_row, out_column = first_row // STRIDE_H, first_column // STRIDE_W
        seen = (first_row >= 0) & (first_column >= 0) & (first_row % STRIDE_H == 0) & (first_column % STRIDE_W == 0)
        seen = valid & seen & (out_row < height // STRIDE_H) & (out_column < width // STRIDE_W)
        place = _stored(slots, image, out_row, out_column, seen, rows, columns, EDGE // STRIDE_H, EDGE // STRIDE_W)
        where, mask = place[:, None] * channels + c[None, :], (place >= 0)[:, None] & channel
        if MAX:
            mask = mask & (tl.load(taps + where, mask=mask, other=-1) == tap)
        value = tl.load(grad + where, mask=mask, other=0.0).to(tl.float32)
        if not MAX:
            size = _divisor(out_row, out_column, height, width, left, right, top, bottom, divisor, KH, KW, STRIDE_H, STRIDE_W, WITH_PAD, FIXED)
            value = tl.div_rn(value, tl.zeros_like(value) + tl.where(seen, size, 1.0)[:, None])
        total += value
    tl.store(out + q[:, None] * channels + c[None, :], total.to(out.dtype.element_ty), mask=valid[:, None] & channel)


def _constants(geometry, edge, channels):
    block_c = min(64, triton.next_power_of_2(channels))
    names = ("MAX", "KH", "KW", "STRIDE_H", "STRIDE_W", "DILATION_H", "DILATION_W")
    return {**dict(zip(names, geometry[:7], strict=True)), "WITH_PAD": bool(geometry[12]), "FIXED": geometry[13] > 0, "EDGE": edge,
            "BLOCK_P": min(128, 1024 // block_c), "BLOCK_C": block_c}


def _grid(positions, channels, constants):
    return (triton.cdiv(positions, constants["BLOCK_P"]) * triton.cdiv(channels, constants["BLOCK_C"]),)


def forward(x, coords, slots, geometry, pad_value, out, taps):
    """Fill out and taps (max) [T, C, t / s, t / s] from x [T, C, t, t]; channels-last. geometry: the 14 numbers of `PoolGeometry`."""
    positions, channels = out.shape[0] * out.shape[2] * out.shape[3], out.shape[1]
    if not out.numel():
        return
    constants = _constants(geometry, x.shape[2], channels)
    _forward_kernel[_grid(positions, channels, constants)](x, coords, slots, out, taps, positions, channels, slots.shape[1], slots.shape[2], *geometry[7:11],
                                                           geometry[13], pad_value, **constants, num_warps=4)


def backward(grad, taps, coords, slots, geometry, out):
    """Fill out [T, C, t, t] from grad and taps (max) [T, C, t / s, t / s]; channels-last."""
    positions, channels = out.shape[0] * out.shape[2] * out.shape[3], out.shape[1]
    if not out.numel():
        return
    constants = _constants(geometry, out.shape[2], channels)
    _backward_kernel[_grid(positions, channels, constants)](grad, taps, coords, slots, out, positions, channels, slots.shape[1], slots.shape[2], *geometry[7:11],
                                                            geometry[13], **constants, num_warps=4)


def compile_cases():
    """(name, kernel, signature, constants, options) of the variants for usual layers."""
    size = dict.fromkeys(("positions", "channels", "rows", "columns", "left", "right", "top", "bottom", "divisor"), "i32")
    for kind in ("fp32", "bf16", "fp16"):
        for name, geometry in (("max 3x3 / 2", (1, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 0, 1, 0)), ("avg 3x3 / 2", (0, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 0, 0, 0))):
            constants = _constants(geometry, 16, 64)
            x, taps = f"*{kind}", "*i16"
            yield (f"{name} {kind}", _forward_kernel, {"x": x, "coords": "*i32", "slots": "*i32", "out": x, "taps": taps, **size, "pad_value": "fp32"}, constants,
                   {"num_warps": 4})
            yield (f"{name} {kind} backward", _backward_kernel, {"grad": x, "taps": taps, "coords": "*i32", "slots": "*i32", "out": x, **size}, constants,
                   {"num_warps": 4})
