"""Depthwise `tile_conv`: every channel with its own filter; forward, input gradient (mirrored taps, parity classes), weight gradient.

Program <-> BLOCK_M positions x BLOCK_C channels (for the input gradient at stride s, of one of s * s parity classes). A position's
neighbour is looked up once per tap for all channels of the block; repeated reads are left to the caches. The weight gradient takes
one program per tap, channel block and share of the positions, and adds the shares in order in a second kernel.
Accumulates in float32. Deterministic.
"""

import math

import torch
import triton
import triton.language as tl
from mwm.kernels import conv_configs
from mwm.kernels.tile_conv import check_sizes, first_tap, neighbour
from mwm.kernels.tile_conv_weight import shares_of, sum_shares


@triton.jit
def _depthwise_kernel(
    source,  # packed rows that are read [S * EDGE * EDGE, channels]
    weight,  # [channels, KH * KW]
    bias,  # [channels], or any pointer
    coords,  # of the tiles that are written [T, 3]
    slots,  # of the tiles that are read [B, grid_h, grid_w]
    out,  # packed rows that are written, of as many channels
    rows,  # output positions of one parity class
    grid_h,
    grid_w,
    channels,
    blocks_m,
    blocks_c,
    TRANSPOSED: tl.constexpr,
    EDGE: tl.constexpr,
    LATTICE: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    pid_c = pid % blocks_c
    pid_m = pid // blocks_c % blocks_m
    parity = pid // blocks_c // blocks_m
    if TRANSPOSED:
        u_first = first_tap(parity // STRIDE, TOP, DH, STRIDE, STEP_H)
        v_first = first_tap(parity % STRIDE, LEFT, DW, STRIDE, STEP_W)
        taps_h = tl.where((u_first < 0) | (u_first >= KH), 0, (KH - 1 - u_first) // STEP_H + 1)
        taps_w = tl.where((v_first < 0) | (v_first >= KW), 0, (KW - 1 - v_first) // STEP_W + 1)
        start_y = (parity // STRIDE + TOP - u_first * DH) // STRIDE
        start_x = (parity % STRIDE + LEFT - v_first * DW) // STRIDE
        DELTA_H: tl.constexpr = -(STEP_H * DH // STRIDE)
        DELTA_W: tl.constexpr = -(STEP_W * DW // STRIDE)
        FACTOR: tl.constexpr = 1
    else:
        u_first = 0
        v_first = 0
        taps_h = KH
        taps_w = KW
        start_y = -TOP
        start_x = -LEFT
        DELTA_H: tl.constexpr = DH
        DELTA_W: tl.constexpr = DW
        FACTOR: tl.constexpr = STRIDE
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = m < rows
    tile = m // (LATTICE * LATTICE)
    i = m % (LATTICE * LATTICE) // LATTICE
    j = m % LATTICE
    base = tl.load(coords + tile * 3, mask=valid, other=0) * (grid_h * grid_w)
    y0 = tl.load(coords + tile * 3 + 1, mask=valid, other=0) * EDGE + i * FACTOR + start_y
    x0 = tl.load(coords + tile * 3 + 2, mask=valid, other=0) * EDGE + j * FACTOR + start_x
    c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    good = c < channels
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    u, v = pid * 0, pid * 0
    # One loop, not unrolled: all look-ups of a window at once would not fit the registers.
    for _ in range(taps_h * taps_w):
        row, seen = neighbour(slots, base, y0 + u * DELTA_H, x0 + v * DELTA_W, valid, grid_h * EDGE, grid_w * EDGE, grid_w, EDGE)
        a = tl.load(source + (row.to(tl.int64)[:, None] * channels + c[None, :]), mask=seen[:, None] & good[None, :], other=0.0)
        place = (u_first + u * STEP_H) * KW + v_first + v * STEP_W
        w = tl.load(weight + (c * (KH * KW) + place), mask=good, other=0.0)
        acc += a.to(tl.float32) * w.to(tl.float32)[None, :]
        v += 1
        line = (v == taps_w).to(tl.int32)
        v = v * (1 - line)
        u += line
    if HAS_BIAS:
        acc += tl.load(bias + c, mask=good, other=0.0).to(tl.float32)[None, :]
    if TRANSPOSED:
        FULL: tl.constexpr = LATTICE * STRIDE
        target = tile * (FULL * FULL) + (i * STRIDE + parity // STRIDE) * FULL + j * STRIDE + parity % STRIDE
    else:
        target = m
    tl.store(out + (target.to(tl.int64)[:, None] * channels + c[None, :]), acc.to(out.dtype.element_ty), mask=valid[:, None] & good[None, :])


@triton.jit
def _depthwise_weight_kernel(
    grad,  # packed rows [rows, channels]
    source,  # packed rows [S * EDGE * EDGE, channels]
    coords,  # of the tiles of grad [T, 3]
    slots,  # of the tiles of source [B, grid_h, grid_w]
    sums,  # [shares, channels, KH * KW]
    rows,
    grid_h,
    grid_w,
    channels,
    blocks_c,
    per_share,
    EDGE: tl.constexpr,
    LATTICE: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    place = pid % (KH * KW)
    block_c = pid // (KH * KW) % blocks_c
    share = pid // (KH * KW) // blocks_c
    dy = place // KW * DH - TOP
    dx = place % KW * DW - LEFT
    c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    good = c < channels
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for block in range(share * per_share, share * per_share + per_share):
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = m < rows
        tile = m // (LATTICE * LATTICE)
        base = tl.load(coords + tile * 3, mask=valid, other=0) * (grid_h * grid_w)
        y = tl.load(coords + tile * 3 + 1, mask=valid, other=0) * EDGE + m % (LATTICE * LATTICE) // LATTICE * STRIDE + dy
        x = tl.load(coords + tile * 3 + 2, mask=valid, other=0) * EDGE + m % LATTICE * STRIDE + dx
        row, seen = neighbour(slots, base, y, x, valid, grid_h * EDGE, grid_w * EDGE, grid_w, EDGE)
        mask = seen[:, None] & good[None, :]
        a = tl.load(grad + (m.to(tl.int64)[:, None] * channels + c[None, :]), mask=mask, other=0.0)
        b = tl.load(source + (row.to(tl.int64)[:, None] * channels + c[None, :]), mask=mask, other=0.0)
        acc += a.to(tl.float32) * b.to(tl.float32)
    at = share.to(tl.int64) * (channels * KH * KW) + c * (KH * KW) + place
    tl.store(sums + at, tl.sum(acc, 0).to(sums.dtype.element_ty), mask=good)


def forward(x, weight, bias, coords, slots, geometry, out):
    """Convolve.

    Args:
        x: Packed tiles, channels-last. float32 | bfloat16 | float16 [S, C, t, t]
        weight: Filters, contiguous. [C, 1, kh, kw]
        bias: Contiguous, or None. [C]
        coords: Where the tiles of the result lie. int32 [T, 3]
        slots: Where the tiles of x lie. int32 [B, Gh, Gw]
        geometry: [stride, dilation of rows, of columns, padding left, right, top, bottom, groups]
        out: Receives the result, channels-last. [T, C, t // s, t // s]
    """
    _launch(x, weight, bias, coords, slots, geometry, out, False)


def grad_input(grad, weight, coords, slots, geometry, out):
    """The transpose of `forward` in x: grad [S, C, t // s, t // s] -> out [T, C, t, t]."""
    _launch(grad, weight, None, coords, slots, geometry, out, True)


def grad_weight(grad, x, coords, slots, geometry, out):
    """The transpose of `forward` in weight: grad [T, C, t // s, t // s], x [S, C, t, t] -> out, contiguous [C, 1, kh, kw]."""
    if out.numel() == 0 or grad.numel() == 0 or x.numel() == 0:
        out.zero_()
        return
    grid, (rows, channels, blocks_c, shares, per_share), constants, options = _plan_weight(grad.shape, x.shape, out.shape, geometry)
    check_sizes(x.shape, out.shape, grad.shape, slots.shape, grid[0])
    sums = out if shares == 1 else torch.empty((shares, out.numel()), dtype=torch.float32, device=out.device)
    _depthwise_weight_kernel[grid](grad, x, coords, slots, sums, rows, slots.shape[1], slots.shape[2], channels, blocks_c, per_share, **constants, **options)
    if shares > 1:
        sum_shares(sums, out)


_OPTIONS = dict(num_warps=4, num_stages=2)
_POSITIONS, _CHANNELS = 32, 64  # of a block
_PROGRAMS = 2048  # of the weight gradient


def _plan(source_shape, weight_shape, out_shape, geometry, transposed):
    stride, dilation_h, dilation_w, left, _, top = geometry[:6]
    lattice = out_shape[2] // stride if transposed else out_shape[2]
    rows, channels = out_shape[0] * lattice * lattice, out_shape[1]
    blocks_m, blocks_c = triton.cdiv(rows, _POSITIONS), triton.cdiv(channels, _CHANNELS)
    steps = [stride // math.gcd(stride, d) if transposed else 1 for d in (dilation_h, dilation_w)]
    constants = dict(
        TRANSPOSED=transposed, EDGE=source_shape[2], LATTICE=lattice, KH=weight_shape[2], KW=weight_shape[3], STRIDE=stride, DH=dilation_h, DW=dilation_w,
        TOP=top, LEFT=left, STEP_H=steps[0], STEP_W=steps[1], BLOCK_M=_POSITIONS, BLOCK_C=_CHANNELS,
    )
    programs = blocks_m * blocks_c * (stride * stride if transposed else 1)
    return (programs,), (rows, channels, blocks_m, blocks_c), constants, _OPTIONS


def _plan_weight(grad_shape, x_shape, out_shape, geometry):
    stride, dilation_h, dilation_w, left, _, top = geometry[:6]
    lattice, channels, (kernel_h, kernel_w) = grad_shape[2], grad_shape[1], out_shape[2:]
    rows, blocks_c = grad_shape[0] * lattice * lattice, triton.cdiv(channels, _CHANNELS)
    programs = blocks_c * kernel_h * kernel_w
    shares, per_share = shares_of(triton.cdiv(rows, _POSITIONS), programs, _PROGRAMS, channels * kernel_h * kernel_w)
    constants = dict(EDGE=x_shape[2], LATTICE=lattice, KH=kernel_h, KW=kernel_w, STRIDE=stride, DH=dilation_h, DW=dilation_w, TOP=top, LEFT=left,
                     BLOCK_M=_POSITIONS, BLOCK_C=_CHANNELS)
    return (programs * shares,), (rows, channels, blocks_c, shares, per_share), constants, _OPTIONS


def _launch(source, weight, bias, coords, slots, geometry, out, transposed):
    if out.numel() == 0:
        return
    grid, (rows, channels, blocks_m, blocks_c), constants, options = _plan(source.shape, weight.shape, out.shape, geometry, transposed)
    check_sizes(source.shape, weight.shape, out.shape, slots.shape, grid[0])
    _depthwise_kernel[grid](source, weight, weight if bias is None else bias, coords, slots, out, rows, slots.shape[1], slots.shape[2], channels, blocks_m,
                            blocks_c, HAS_BIAS=bias is not None, **constants, **options)


_LAYERS = {"7x7 t8": (8, 7, 1), "7x7 t4": (4, 7, 1), "7x7 t2": (2, 7, 1), "7x7 t1": (1, 7, 1), "3x3/2 t8": (8, 3, 2), "5x5 t7": (7, 5, 1)}
_SOME_LAYERS = ("7x7 t8", "7x7 t1", "3x3/2 t8", "5x5 t7")


def compile_cases(every=False):
    """(name, kernel, signature, constants, options) of every dtype and way through the kernels; without `every`, most of them in bfloat16 only."""
    for element in conv_configs.ELEMENTS.values():
        for name, (edge, kernel, stride) in _LAYERS.items():
            if not every and (name not in _SOME_LAYERS if element == "bf16" else name != "7x7 t8"):
                continue
            pad = (kernel - 1) // 2
            geometry, weight = [stride, 1, 1, pad, pad, pad, pad, 96], (96, 1, kernel, kernel)
            x, grad = (64, 96, edge, edge), (64, 96, edge // stride, edge // stride)
            places = {"coords": "*i32", "slots": "*i32"}
            for transposed in (False, True):
                _, _, constants, options = _plan(*((grad, weight, x) if transposed else (x, weight, grad)), geometry, transposed)
                signature = dict.fromkeys(("source", "weight", "bias", "out"), f"*{element}") | places
                signature |= dict.fromkeys(("rows", "grid_h", "grid_w", "channels", "blocks_m", "blocks_c"), "i32")
                yield (f"depthwise {'input gradient' if transposed else 'forward'} {name} {element}", _depthwise_kernel, signature,
                       constants | dict(HAS_BIAS=not transposed), options)
            _, _, constants, options = _plan_weight(grad, x, weight, geometry)
            signature = dict.fromkeys(("grad", "source"), f"*{element}") | places | {"sums": "*fp32"}
            signature |= dict.fromkeys(("rows", "grid_h", "grid_w", "channels", "blocks_c", "per_share"), "i32")
            yield f"depthwise weight gradient {name} {element}", _depthwise_weight_kernel, signature, constants, options
