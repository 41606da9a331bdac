"""Batch norm of channels-last rows [R, C] with a residual and a ReLU in the same pass: two reads forward, two backward.

A program takes BLOCK_R rows by BLOCK_C channels. Sums go in two stages of fixed order: shares of the rows, whose number depends on shapes alone, then
a program per few channels adds them in float64. Deviations are summed from the mean of the first rows of a share, so that a mean far from zero costs no digits.
"""

import torch
import triton
import triton.language as tl

MOST_SHARES = 512
_AIM = 1056  # programs in a stage of sums: eight for each of the 132 multiprocessors of an H100


@triton.jit
def rectified(y, ACTIVATION: tl.constexpr):
    """0: y; 1: relu; 2: relu6. NaN stays."""
    if ACTIVATION > 0:
        y = tl.where(y < 0, 0.0, y)
    if ACTIVATION == 2:
        y = tl.where(y > 6, 6.0, y)
    return y


@triton.jit
def passed(grad, y, ACTIVATION: tl.constexpr):
    """The gradient before the activation, from y on either side of it."""
    if ACTIVATION > 0:
        grad = tl.where(y <= 0, 0.0, grad)
    if ACTIVATION == 2:
        grad = tl.where(y >= 6, 0.0, grad)
    return grad


@triton.jit
def channel_block(channels, BLOCK_C: tl.constexpr):
    """(number of the row block or share int64, channels of this program int64 [BLOCK_C])"""
    blocks = tl.cdiv(channels, BLOCK_C)
    return (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)


@triton.jit
def standard(x, mean, var, c, channels, eps):
    """((x - mean) / sqrt(var + eps), 1 / sqrt(var + eps)) of a block of channels; mean, var float32 [C]"""
    centre = tl.load(mean + c, mask=c < channels, other=0.0)
    deviation = tl.sqrt_rn(tl.load(var + c, mask=c < channels, other=1.0) + eps)
    scale = tl.div_rn(tl.zeros_like(deviation) + 1.0, deviation)
    return (x - centre[None, :]) * scale[None, :], scale


@triton.jit
def affine(x_hat, weight, bias, c, channels, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """x_hat * weight + bias"""
    if WEIGHT:
        x_hat = x_hat * tl.load(weight + c, mask=c < channels, other=1.0)[None, :]
    if BIAS:
        x_hat = x_hat + tl.load(bias + c, mask=c < channels, other=0.0)[None, :]
    return x_hat


@triton.jit
def _moments_kernel(x, sums, rows, channels, per_share, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and summed squared deviation of each share. x [R, C]; sums float64 [shares, 2, C]"""
    share, c = channel_block(channels, BLOCK_C)
    first = share * per_share
    last = tl.minimum(first + per_share, rows)
    r = first + tl.arange(0, BLOCK_R)
    head = tl.load(x + r[:, None] * channels + c[None, :], mask=(r < last)[:, None] & (c < channels)[None, :], other=0.0).to(tl.float32)
    start = tl.sum(head, 0) / tl.minimum(last - first, BLOCK_R).to(tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for row in range(first, last, BLOCK_R):
        r = row + tl.arange(0, BLOCK_R)
        valid = (r < last)[:, None] & (c < channels)[None, :]
        value = tl.load(x + r[:, None] * channels + c[None, :], mask=valid, other=0.0).to(tl.float32)
        deviation = tl.where(valid, value - start[None, :], 0.0)
        total += deviation
        squares += deviation * deviation
    count = (last - first).to(tl.float64)
    mean = tl.sum(total.to(tl.float64), 0) / count
    spread = tl.sum(squares.to(tl.float64), 0) - mean * mean * count
    place = sums + share * 2 * channels + c
    tl.store(place, start.to(tl.float64) + mean, mask=c < channels)
    tl.store(place + channels, tl.maximum(spread, 0.0, propagate_nan=tl.PropagateNan.ALL), mask=c < channels)


@triton.jit
def _join_moments_kernel(sums, mean, var, running_mean, running_var, momentum, rows, channels, per_share, shares, RUNNING: tl.constexpr,
                         BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and variance of all rows; moves the running ones. mean, var, running float32 [C]"""
    _, c = channel_block(channels, BLOCK_C)
    s = tl.arange(0, BLOCK_S).to(tl.int64)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float64)
    for start in range(0, shares, BLOCK_S):
        share = start + s
        valid = (share < shares)[:, None] & (c < channels)[None, :]
        count = tl.minimum(rows - share * per_share, per_share).to(tl.float64)
        centre = tl.load(sums + share[:, None] * 2 * channels + c[None, :], mask=valid, other=0.0)
        total += tl.where(valid, centre * count[:, None], 0.0)
    middle = tl.sum(total, 0) / rows
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float64)
    for start in range(0, shares, BLOCK_S):
        share = start + s
        valid = (share < shares)[:, None] & (c < channels)[None, :]
        count = tl.minimum(rows - share * per_share, per_share).to(tl.float64)
        place = sums + share[:, None] * 2 * channels + c[None, :]
        off = tl.load(place, mask=valid, other=0.0) - middle[None, :]
        total += tl.where(valid, tl.load(place + channels, mask=valid, other=0.0) + off * off * count[:, None], 0.0)
    spread = tl.sum(total, 0)
    tl.store(mean + c, middle.to(tl.float32), mask=c < channels)
    tl.store(var + c, (spread / rows).to(tl.float32), mask=c < channels)
    if RUNNING:
        before = tl.load(running_mean + c, mask=c < channels, other=0.0)
        tl.store(running_mean + c, before + momentum * (middle.to(tl.float32) - before), mask=c < channels)
        before = tl.load(running_var + c, mask=c < channels, other=0.0)
        tl.store(running_var + c, before + momentum * ((spread / (rows - 1)).to(tl.float32) - before), mask=c < channels)


@triton.jit
def _apply_kernel(x, residual, weight, bias, mean, var, eps, out, rows, channels, WEIGHT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
                  ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """x, residual, out [R, C]; weight, bias, mean, var float32 [C]"""
    block, c = channel_block(channels, BLOCK_C)
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = (r < rows)[:, None] & (c < channels)[None, :]
    place = r[:, None] * channels + c[None, :]
    x_hat, _ = standard(tl.load(x + place, mask=valid, other=0.0).to(tl.float32), mean, var, c, channels, eps)
    y = affine(x_hat, weight, bias, c, channels, WEIGHT, BIAS)
    if RESIDUAL:
        y = y + tl.load(residual + place, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + place, rectified(y, ACTIVATION).to(out.dtype.element_ty), mask=valid)


@triton.jit
def _backward_sums_kernel(grad, x, out, weight, bias, mean, var, eps, sums, rows, channels, per_share, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
                          OUT: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums of g and of g * x_hat of each share, g the gradient before the activation. grad, x, out [R, C]; sums float64 [shares, 2, C]"""
    share, c = channel_block(channels, BLOCK_C)
    first = share * per_share
    last = tl.minimum(first + per_share, rows)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    product = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for row in range(first, last, BLOCK_R):
        r = row + tl.arange(0, BLOCK_R)
        valid = (r < last)[:, None] & (c < channels)[None, :]
        place = r[:, None] * channels + c[None, :]
        g = tl.load(grad + place, mask=valid, other=0.0).to(tl.float32)
        x_hat, _ = standard(tl.load(x + place, mask=valid, other=0.0).to(tl.float32), mean, var, c, channels, eps)
        if OUT:
            g = passed(g, tl.load(out + place, mask=valid, other=1.0).to(tl.float32), ACTIVATION)
        else:
            g = passed(g, affine(x_hat, weight, bias, c, channels, WEIGHT, BIAS), ACTIVATION)
        g = tl.where(valid, g, 0.0)
        total += g
        product += tl.where(valid, g * x_hat, 0.0)
    place = sums + share * 2 * channels + c
    tl.store(place, tl.sum(total.to(tl.float64), 0), mask=c < channels)
    tl.store(place + channels, tl.sum(product.to(tl.float64), 0), mask=c < channels)


@triton.jit
def _join_sums_kernel(sums, totals, channels, shares, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """totals float32 [2, C] of sums float64 [shares, 2, C]; the first axis of the grid takes both rows as 2 * C channels."""
    _, c = channel_block(2 * channels, BLOCK_C)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float64)
    for start in range(0, shares, BLOCK_S):
        share = start + tl.arange(0, BLOCK_S).to(tl.int64)
        valid = (share < shares)[:, None] & (c < 2 * channels)[None, :]
        total += tl.load(sums + share[:, None] * 2 * channels + c[None, :], mask=valid, other=0.0)
    tl.store(totals + c, tl.sum(total, 0).to(tl.float32), mask=c < 2 * channels)


@triton.jit
def _backward_kernel(grad, x, out, weight, bias, mean, var, eps, totals, grad_x, grad_residual, rows, channels, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
                     OUT: tl.constexpr, GRAD_X: tl.constexpr, GRAD_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr,
                     BLOCK_C: tl.constexpr):
    """grad, x, out, grad_x, grad_residual [R, C]; totals float32 [2, C]"""
    block, c = channel_block(channels, BLOCK_C)
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = (r < rows)[:, None] & (c < channels)[None, :]
    place = r[:, None] * channels + c[None, :]
    g = tl.load(grad + place, mask=valid, other=0.0).to(tl.float32)
    x_hat, scale = standard(tl.load(x + place, mask=valid, other=0.0).to(tl.float32), mean, var, c, channels, eps)
    if OUT:
        g = passed(g, tl.load(out + place, mask=valid, other=1.0).to(tl.float32), ACTIVATION)
    else:
        g = passed(g, affine(x_hat, weight, bias, c, channels, WEIGHT, BIAS), ACTIVATION)
    if GRAD_RESIDUAL:
        tl.store(grad_residual + place, g.to(grad_residual.dtype.element_ty), mask=valid)
    if GRAD_X:
        if WEIGHT:
            scale = scale * tl.load(weight + c, mask=c < channels, other=1.0)
        count = tl.zeros_like(scale) + rows
        mean_g = tl.div_rn(tl.load(totals + c, mask=c < channels, other=0.0), count)
        mean_product = tl.div_rn(tl.load(totals + channels + c, mask=c < channels, other=0.0), count)
        slope = (g - mean_g[None, :] - x_hat * mean_product[None, :]) * scale[None, :]
        tl.store(grad_x + place, slope.to(grad_x.dtype.element_ty), mask=valid)


def _blocks(channels, values=2048):
    """(BLOCK_R, BLOCK_C), of so many values; 32 channels where a wider block would be cut. Running sums take half, or they fill the registers."""
    block_c = min(128, triton.next_power_of_2(channels))
    if channels > 32 and channels % block_c:
        block_c = 64 if channels % 64 == 0 else 32
    return values // block_c, block_c


def _shares(rows, channels):
    """(shares, rows of a share): a function of shapes alone."""
    block_r, block_c = _blocks(channels, 1024)
    wanted = max(1, min(MOST_SHARES, _AIM // triton.cdiv(channels, block_c), triton.cdiv(rows, 8 * block_r)))
    per_share = triton.cdiv(triton.cdiv(rows, wanted), block_r) * block_r
    return triton.cdiv(rows, per_share), per_share


def _join_blocks(channels):
    return 32, min(16, triton.next_power_of_2(channels))


def _size(x):
    return x.shape[0] * x.shape[2] * x.shape[3], x.shape[1]


def moments(x, mean, var, running_mean, running_var, momentum):
    """Fill mean and var, float32 [C], from x [N, C, H, W], channels-last; move running_mean and running_var, float32 [C] or None."""
    rows, channels = _size(x)
    (block_r, block_c), (shares, per_share), (join_s, join_c) = _blocks(channels, 1024), _shares(rows, channels), _join_blocks(channels)
    sums = torch.empty((shares, 2, channels), dtype=torch.float64, device=x.device)
    _moments_kernel[(shares * triton.cdiv(channels, block_c),)](x, sums, rows, channels, per_share, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4)
    running = running_mean is not None
    _join_moments_kernel[(triton.cdiv(channels, join_c),)](
        sums, mean, var, running_mean if running else mean, running_var if running else var, momentum, rows, channels, per_share, shares, RUNNING=running,
        BLOCK_S=join_s, BLOCK_C=join_c, num_warps=4)


def apply(x, residual, weight, bias, mean, var, eps, activation, out):
    """Fill out; x, residual (or None) and out [N, C, H, W], channels-last; weight, bias (or None), mean, var float32 [C]."""
    rows, channels = _size(x)
    block_r, block_c = _blocks(channels)
    if not x.numel():
        return
    _apply_kernel[(triton.cdiv(rows, block_r) * triton.cdiv(channels, block_c),)](
        x, x if residual is None else residual, mean if weight is None else weight, mean if bias is None else bias, mean, var, eps, out, rows, channels,
        WEIGHT=weight is not None, BIAS=bias is not None, RESIDUAL=residual is not None, ACTIVATION=activation, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=4)


def backward(grad, x, out, weight, bias, mean, var, eps, activation, totals, grad_x, grad_residual):
    """Fill totals float32 [2, C] (gradients of bias and weight), and grad_x and grad_residual where they are not None.

    grad, x, out (or None: the activation is computed again from x), grad_x, grad_residual: [N, C, H, W], channels-last.
    """
    rows, channels = _size(x)
    (block_r, block_c), (shares, per_share), (join_s, join_c) = _blocks(channels), _shares(rows, channels), _join_blocks(2 * channels)
    blocks_c = triton.cdiv(channels, block_c)
    maps = grad, x, x if out is None else out, mean if weight is None else weight, mean if bias is None else bias, mean, var, eps
    flags = {"WEIGHT": weight is not None, "BIAS": bias is not None, "OUT": out is not None, "ACTIVATION": activation, "BLOCK_R": block_r, "BLOCK_C": block_c}
    sums = torch.empty((shares, 2, channels), dtype=torch.float64, device=x.device)
    _backward_sums_kernel[(shares * blocks_c,)](*maps, sums, rows, channels, per_share, **{**flags, "BLOCK_R": _blocks(channels, 1024)[0]}, num_warps=4)
    _join_sums_kernel[(triton.cdiv(2 * channels, join_c),)](sums, totals, channels, shares, BLOCK_S=join_s, BLOCK_C=join_c, num_warps=4)
    if grad_x is not None or grad_residual is not None:
        _backward_kernel[(triton.cdiv(rows, block_r) * blocks_c,)](
            *maps, totals, x if grad_x is None else grad_x, x if grad_residual is None else grad_residual, rows, channels, **flags, GRAD_X=grad_x is not None,
            GRAD_RESIDUAL=grad_residual is not None, num_warps=4)


def compile_cases():
    """(name, kernel, signature, constants, options) of the variants for usual maps."""
    options = {"num_warps": 4}
    size = {"rows": "i32", "channels": "i32"}
    rows_of = dict.fromkeys(("weight", "bias", "mean", "var"), "*fp32")
    for kind in ("fp32", "bf16", "fp16"):
        for channels in (64, 256, 96, 16) if kind == "bf16" else (256,):
            block_r, block_c = _blocks(channels)
            blocks, x = {"BLOCK_R": block_r, "BLOCK_C": block_c}, f"*{kind}"
            half = {**blocks, "BLOCK_R": _blocks(channels, 1024)[0]}
            yield f"moments {kind} {channels}", _moments_kernel, {"x": x, "sums": "*fp64", **size, "per_share": "i32"}, half, options
            for residual, activation in ((True, 1), (False, 2), (False, 0)) if channels == 256 else ((True, 1),):
                flags = {"WEIGHT": True, "BIAS": True, "ACTIVATION": activation, **blocks}
                label = f"{kind} {channels}{' residual' if residual else ''} activation {activation}"
                yield (f"apply {label}", _apply_kernel, {"x": x, "residual": x, **rows_of, "eps": "fp32", "out": x, **size}, {**flags, "RESIDUAL": residual}, options)
                maps = {"grad": x, "x": x, "out": x, **rows_of, "eps": "fp32"}
                yield f"backward sums {label}", _backward_sums_kernel, {**maps, "sums": "*fp64", **size, "per_share": "i32"}, {**flags, **half, "OUT": residual}, options
                yield (f"backward {label}", _backward_kernel, {**maps, "totals": "*fp32", "grad_x": x, "grad_residual": x, **size},
                       {**flags, "OUT": residual, "GRAD_X": True, "GRAD_RESIDUAL": residual}, options)
    join = {"BLOCK_S": 32, "BLOCK_C": 16}
    yield ("join moments", _join_moments_kernel, {"sums": "*fp64", "mean": "*fp32", "var": "*fp32", "running_mean": "*fp32", "running_var": "*fp32", "momentum": "fp32",
                                                  **size, "per_share": "i32", "shares": "i32"}, {**join, "RUNNING": True}, options)
    yield "join sums", _join_sums_kernel, {"sums": "*fp64", "totals": "*fp32", "channels": "i32", "shares": "i32"}, join, options
