"""Convolution of packed tiles as one implicit GEMM: rows are output positions, the inner dimension runs over taps and channels.

Program <-> BLOCK_M output positions x BLOCK_N output channels of one group (and, for the input gradient at stride s, of one of the
s * s parity classes, so that no product with a structural zero is formed). One flat loop over (channel chunk, tap) with one dot in
it; where a tap reads is arithmetic plus one look-up in `slots`, 4 bytes a row, which stays in the caches. Hidden neighbours are
masked loads. Taps are the inner loop: neighbouring taps read the same cache lines. Offsets into the maps are 64 bits wide.
Forward and input gradient are the same kernel: the latter reads the output's gradient through mirrored taps.
Deterministic: every output is one program's sum in one order.
"""

import math

import torch
import triton
import triton.language as tl
from mwm.kernels import conv_configs, launch

MOST = 2**31 - 1024  # what 32 bits count, rounded up to whole blocks

@triton.jit
def first_tap(parity, PAD: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr, STEP: tl.constexpr):
    """The first tap u with (parity + PAD - u * DILATION) a multiple of STRIDE; -1 where there is none. They repeat every STEP taps."""
    first = parity * 0 - 1
    for u in tl.static_range(STEP):
        first = tl.where((parity + PAD + u * DILATION * (STRIDE - 1)) % STRIDE == 0, u, first)
    return first


@triton.jit
def neighbour(slots, base, y, x, valid, height, width, grid_w, EDGE: tl.constexpr):
    """(row of the packed map that lies at (y, x) of the dense one, whether it is visible)."""
    inside = valid & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    slot = tl.load(slots + (base + (y // EDGE) * grid_w + x // EDGE), mask=inside, other=-1)
    return slot * (EDGE * EDGE) + (y % EDGE) * EDGE + x % EDGE, slot >= 0


@triton.jit(do_not_specialize=["rows", "blocks_m"])  # they change with every mask; the code would be compiled anew for multiples of 16
def _tile_conv_kernel(
    source,  # packed rows that are read [S * EDGE * EDGE, groups * depth]
    weight,  # [K, KH, KW, C / groups], contiguous
    bias,  # [groups * columns], or any pointer
    coords,  # of the tiles that are written [T, 3]
    slots,  # of the tiles that are read [B, grid_h, grid_w]
    out,  # packed rows that are written, groups * columns wide
    rows,  # output positions of one parity class
    grid_h,
    grid_w,
    depth,  # channels that are read, of one group, divided by ALIGN_IN as source_stride is
    columns,  # channels that are written, of one group, divided by ALIGN_OUT as out_stride is
    source_stride,
    out_stride,
    blocks_m,
    blocks_n,
    ALIGN_IN: tl.constexpr,
    ALIGN_OUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # the input gradient
    EDGE: tl.constexpr,  # of a tile that is read
    LATTICE: tl.constexpr,  # edge of a tile that is written, of one parity class
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
    FLAT: tl.constexpr,  # few channels: the inner dimension is (tap, channel) without gaps
    SKIP: tl.constexpr,  # taps that no row of the block needs are left out; else 0; the number of taps as a power of two
    EVEN: tl.constexpr,  # BLOCK_K divides depth
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    depth *= ALIGN_IN
    source_stride *= ALIGN_IN
    columns *= ALIGN_OUT
    out_stride *= ALIGN_OUT
    pid = tl.program_id(0)
    per_problem = blocks_m * blocks_n
    problem = pid // per_problem
    pid = pid % per_problem
    first_m = pid // (GROUP_M * blocks_n) * GROUP_M
    group_m = tl.minimum(blocks_m - first_m, GROUP_M)
    pid_m = first_m + pid % (GROUP_M * blocks_n) % group_m
    pid_n = pid % (GROUP_M * blocks_n) // group_m

    if TRANSPOSED:
        group = problem // (STRIDE * STRIDE)
        parity_y = problem % (STRIDE * STRIDE) // STRIDE
        parity_x = problem % STRIDE
        u_first = first_tap(parity_y, TOP, DH, STRIDE, STEP_H)
        v_first = first_tap(parity_x, LEFT, DW, STRIDE, STEP_W)
        taps_h = tl.where((u_first < 0) | (u_first >= KH), 0, (KH - 1 - u_first) // STEP_H + 1)
        taps_w = tl.where((v_first < 0) | (v_first >= KW), 0, (KW - 1 - v_first) // STEP_W + 1)
        per_line = tl.maximum(taps_w, 1)
        # The division is exact wherever there is a tap.
        start_y = (parity_y + TOP - u_first * DH) // STRIDE
        start_x = (parity_x + LEFT - v_first * DW) // STRIDE
        DELTA_H: tl.constexpr = -(STEP_H * DH // STRIDE)
        DELTA_W: tl.constexpr = -(STEP_W * DW // STRIDE)
        FACTOR: tl.constexpr = 1
    else:
        group = problem
        parity_y = 0
        parity_x = 0
        u_first = 0
        v_first = 0
        taps_h = KH
        taps_w = KW
        per_line = KW
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
    image = tl.load(coords + tile * 3, mask=valid, other=0)
    y0 = tl.load(coords + tile * 3 + 1, mask=valid, other=0) * EDGE + i * FACTOR + start_y
    x0 = tl.load(coords + tile * 3 + 2, mask=valid, other=0) * EDGE + j * FACTOR + start_x
    base = image * (grid_h * grid_w)
    height = grid_h * EDGE
    width = grid_w * EDGE

    zero = pid * 0
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    source += group.to(tl.int64) * depth
    if TRANSPOSED:
        weight += group.to(tl.int64) * depth * (KH * KW) * columns
    else:
        weight += group.to(tl.int64) * columns * (KH * KW) * depth
    taps = taps_h * taps_w
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    if FLAT:
        inner = taps * depth
        for step in range(tl.cdiv(inner, BLOCK_K)):
            k = step * BLOCK_K + ks
            tap = k // depth
            c = k - tap * depth
            u = tap // per_line
            v = tap - u * per_line
            y = y0[:, None] + (u * DELTA_H)[None, :]
            x = x0[:, None] + (v * DELTA_W)[None, :]
            row, seen = neighbour(slots, base[:, None], y, x, valid[:, None] & (k < inner)[None, :], height, width, grid_w, EDGE)
            a = tl.load(source + (row.to(tl.int64) * source_stride + c[None, :]), mask=seen, other=0.0)
            place = (u_first + u * STEP_H) * KW + v_first + v * STEP_W
            if TRANSPOSED:
                at = (c * (KH * KW) + place)[:, None] * columns + n[None, :]
            else:
                at = n[None, :] * (KH * KW * depth) + (place * depth + c)[:, None]
            b = tl.load(weight + at, mask=(k < inner)[:, None] & (n < columns)[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        if SKIP > 0:
            number = tl.arange(0, SKIP)
            ys = y0[None, :] + (number // per_line * DELTA_H)[:, None]
            xs = x0[None, :] + (number % per_line * DELTA_W)[:, None]
            _, some = neighbour(slots, base[None, :], ys, xs, valid[None, :] & (number < taps)[:, None], height, width, grid_w, EDGE)
            wanted = tl.max(some.to(tl.int32), 1)
            rank = tl.cumsum(wanted, 0) * wanted
            taps = tl.sum(wanted, 0)
        chunk, tap, u, v = zero, zero, zero, zero
        for _ in range(taps * tl.cdiv(depth, BLOCK_K)):
            if SKIP > 0:
                found = tl.sum(tl.where(rank == tap + 1, number, 0), 0)
                u = found // per_line
                v = found - u * per_line
            y = y0 + u * DELTA_H
            x = x0 + v * DELTA_W
            row, seen = neighbour(slots, base, y, x, valid, height, width, grid_w, EDGE)
            k = chunk * BLOCK_K + ks
            mask_a = seen[:, None]
            mask_b = (n < columns)[None, :]
            if not EVEN:
                mask_a = mask_a & (k < depth)[None, :]
                mask_b = mask_b & (k < depth)[:, None]
            a = tl.load(source + (row.to(tl.int64)[:, None] * source_stride + k[None, :]), mask=mask_a, other=0.0)
            place = (u_first + u * STEP_H) * KW + v_first + v * STEP_W
            if TRANSPOSED:
                at = k[:, None] * (KH * KW * columns) + (place * columns + n)[None, :]
            else:
                at = n[None, :] * (KH * KW * depth) + (place * depth + k)[:, None]
            b = tl.load(weight + at, mask=mask_b, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            tap += 1
            if SKIP == 0:
                v += 1
                line = (v == taps_w).to(tl.int32)
                v = v * (1 - line)
                u += line
                last = (u == taps_h).to(tl.int32)
                u = u * (1 - last)
            else:
                last = (tap == taps).to(tl.int32)
            tap = tap * (1 - last)
            chunk += last

    if HAS_BIAS:
        acc += tl.load(bias + group * columns + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    if TRANSPOSED:
        FULL: tl.constexpr = LATTICE * STRIDE
        target = tile * (FULL * FULL) + (i * STRIDE + parity_y) * FULL + j * STRIDE + parity_x
    else:
        target = m
    at = target.to(tl.int64)[:, None] * out_stride + (group * columns + n)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=valid[:, None] & (n < columns)[None, :])


def forward(x, weight, bias, coords, slots, geometry, out, *, tf32=False, config=None):
    """Convolve.

    Args:
        x: Packed tiles, channels-last. float32 | bfloat16 | float16 [S, C, t, t]
        weight: Filters, channels-last memory. [K, C // groups, kh, kw]
        bias: Contiguous, or None. [K]
        coords: Where the tiles of the result lie. int32 [T, 3]
        slots: Where the tiles of x lie. int32 [B, Gh, Gw]
        geometry: [stride, dilation of rows, of columns, padding left, right, top, bottom, groups]
        out: Receives the result, channels-last. [T, K, t // s, t // s]
        tf32: Round float32 operands to TF32, as the tensor cores take them.
        config: Block sizes instead of the shipped table's, for measurements.

    Returns:
        Triton's handle of the compiled kernel; None in the interpreter.
    """
    return _launch(x, weight, bias, coords, slots, geometry, out, False, tf32, config)


def grad_input(grad, weight, bias, coords, slots, geometry, out, *, tf32=False, config=None):
    """The transpose of `forward` in x, plus a bias where one is given.

    Args:
        grad: Packed tiles, channels-last. float32 | bfloat16 | float16 [S, K, t // s, t // s]
        weight: Filters, channels-last memory. [K, C // groups, kh, kw]
        bias: Contiguous, or None. [C]
        coords: Where the tiles of the result lie. int32 [T, 3]
        slots: Where the tiles of grad lie. int32 [B, Gh, Gw]
        geometry: As in `forward`.
        out: Receives the result, channels-last. [T, C, t, t]
        tf32, config: As in `forward`.

    Returns:
        As `forward`.
    """
    return _launch(grad, weight, bias, coords, slots, geometry, out, True, tf32, config)


def plan_launch(source_shape, weight_shape, out_shape, geometry, transposed, kind, device, config=None):
    """(grid, runtime sizes, constants, options) of a launch: a pure function of shapes, kind of numbers and device name."""
    stride, dilation_h, dilation_w, left, _, top, _, groups = geometry
    kernel_h, kernel_w = weight_shape[2:]
    lattice = out_shape[2] // stride if transposed else out_shape[2]
    rows = out_shape[0] * lattice * lattice
    depth, columns = source_shape[1] // groups, out_shape[1] // groups
    flat = depth < conv_configs.LEAST_CHUNK
    aligned = conv_configs.alignment(depth, source_shape[1]), conv_configs.alignment(columns, out_shape[1])
    config = config or conv_configs.pick("tile_conv", "grad_input" if transposed else "forward", kind, rows, columns, depth, device, not flat and min(aligned) == 1)
    blocks_m, blocks_n = -(-rows // config["block_m"]), -(-columns // config["block_n"])
    problems = groups * (stride * stride if transposed else 1)
    steps = [stride // math.gcd(stride, d) if transposed else 1 for d in (dilation_h, dilation_w)]
    constants = dict(
        ALIGN_IN=aligned[0], ALIGN_OUT=aligned[1], TRANSPOSED=transposed,
        EDGE=source_shape[2], LATTICE=lattice, KH=kernel_h, KW=kernel_w, STRIDE=stride, DH=dilation_h, DW=dilation_w,
        TOP=top, LEFT=left, STEP_H=steps[0], STEP_W=steps[1], FLAT=flat,
        SKIP=0 if flat else _skippable(source_shape[2], kernel_h, kernel_w, dilation_h, dilation_w, stride, transposed),
        EVEN=depth % config["block_k"] == 0, BLOCK_M=config["block_m"], BLOCK_N=config["block_n"], BLOCK_K=config["block_k"], GROUP_M=config["group_m"],
    )
    sizes = (rows, depth // aligned[0], columns // aligned[1], blocks_m, blocks_n)
    return (blocks_m * blocks_n * problems,), sizes, constants, dict(num_warps=config["num_warps"], num_stages=config["num_stages"])


def _skippable(edge, kernel_h, kernel_w, dilation_h, dilation_w, stride, transposed):
    """Whether some tap can miss the own tile of every row: only then can a whole block do without it. The taps as a power of two, or 0."""
    taps = kernel_h * kernel_w
    reach = max((kernel_h - 1) * dilation_h, (kernel_w - 1) * dilation_w) // 2
    full = edge * stride if transposed else edge
    return 1 << (taps - 1).bit_length() if 1 < taps <= 64 and reach >= full else 0


def _launch(source, weight, bias, coords, slots, geometry, out, transposed, tf32, config):
    if out.numel() == 0:
        return None
    device = source.device
    key = (source.shape, weight.shape, out.shape, slots.shape, tuple(geometry), transposed, bias is not None, tf32, source.dtype, device,
           None if config is None else tuple(config.items()))
    return _CONV((source, weight, weight if bias is None else bias, coords, slots, out), key)


def _described(source, weight, out, slots, geometry, transposed, has_bias, tf32, dtype, device, config):
    """What follows from the shapes: (grid, numbers and constants by name, options)."""
    grid, sizes, constants, options = plan_launch(source, weight, out, geometry, transposed, conv_configs.kind_of(dtype, tf32),
                                                  conv_configs.device_name(device), None if config is None else dict(config))
    check_sizes(source, weight, out, slots, grid[0])
    values = dict(zip(("rows", "depth", "columns", "blocks_m", "blocks_n"), sizes, strict=True))
    values |= dict(grid_h=slots[1], grid_w=slots[2], source_stride=source[1] // constants["ALIGN_IN"], out_stride=out[1] // constants["ALIGN_OUT"])
    return grid, values | constants | dict(HAS_BIAS=has_bias, PRECISION="tf32" if tf32 else "ieee"), options


_CONV = launch.Launcher(_tile_conv_kernel, _described)


def check_sizes(source, weight, out, slots, programs):
    """Positions, filters and programs are counted in 32 bits (elements in 64); the first four arguments are shapes.

    Raises:
        ValueError: There are more.
    """
    for name, count in (
        ("positions of the input", source[0] * source[2] * source[3]),
        ("positions of the output", out[0] * out[2] * out[3]),
        ("elements of weight", math.prod(weight)),
        ("patches", math.prod(slots)),
        ("programs", programs),
    ):
        if count > MOST:
            raise ValueError(f"tile_conv: {name} must be at most {MOST}, got {count}. Use a smaller batch.")


PLAIN = [1, 1, 1, 1, 1, 1, 1, 1]
LAYERS = {  # edge, channels, filters, kernel, edge of the result, geometry: the ways through the kernels besides the plain 3x3
    "3x3/2 t8": (8, 128, 256, 3, 4, [2, *PLAIN[1:]]),
    "3x3/2 t2": (2, 64, 64, 3, 1, [2, *PLAIN[1:]]),
    "7x7 t1": (1, 256, 256, 7, 1, [1, 1, 1, 3, 3, 3, 3, 1]),
    "stem": (32, 3, 64, 7, 16, [2, 1, 1, 3, 3, 3, 3, 1]),
    "grouped t7": (7, 128, 128, 3, 7, [1, 2, 2, 2, 2, 2, 2, 32]),
    "odd t7": (7, 70, 130, 3, 7, PLAIN),
    "one channel": (8, 1, 8, 7, 4, [2, 1, 1, 3, 3, 3, 3, 1]),
    "grouped by 16": (4, 128, 128, 3, 4, [*PLAIN[:7], 8]),
}


SOME_LAYERS = ("3x3/2 t8", "7x7 t1", "stem", "odd t7")


def layers(direction, every):
    """(name, source shape, weight shape, result shape, geometry, dtype, tf32, device) of what `compile_cases` compiles; forward terms."""
    for dtype, tf32, rows, columns, depth, device in conv_configs.examples("tile_conv", direction, every):
        edge = 8 if rows > 4096 else 1
        tiles, (filters, channels) = rows // (edge * edge), (depth, columns) if direction == "grad_input" else (columns, depth)
        name = f"3x3 {channels}-{filters} t{edge} {rows} rows"
        yield name, (tiles, channels, edge, edge), (filters, channels, 3, 3), (tiles, filters, edge, edge), PLAIN, dtype, tf32, device
    for name, (edge, channels, filters, kernel, small, geometry) in LAYERS.items():
        if not every and name not in SOME_LAYERS:
            continue
        shapes = (4096, channels, edge, edge), (filters, channels // geometry[7], kernel, kernel), (4096, filters, small, small)
        yield name, *shapes, geometry, torch.bfloat16, False, "generic"


def compile_cases(every=False):
    """(name, kernel, signature, constants, options) of layers that take each way through the kernel and of the shipped configs; with `every`, of
    every config in every dtype, else as `conv_configs.examples` says."""
    for direction, transposed in (("forward", False), ("grad_input", True)):
        for name, x, weight, y, geometry, dtype, tf32, device in layers(direction, every):
            kind, element = conv_configs.kind_of(dtype, tf32), conv_configs.ELEMENTS[dtype]
            _, sizes, constants, options = plan_launch(*((y, weight, x) if transposed else (x, weight, y)), geometry, transposed, kind, device)
            constants |= dict(HAS_BIAS=not transposed, PRECISION="tf32" if tf32 else "ieee")
            signature = dict.fromkeys(("source", "weight", "bias", "out"), f"*{element}") | dict.fromkeys(("coords", "slots"), "*i32")
            signature |= dict.fromkeys(("grid_h", "grid_w", "source_stride", "out_stride"), "i32")
            split_ones(dict(zip(("rows", "depth", "columns", "blocks_m", "blocks_n"), sizes, strict=True)), signature, constants)
            yield f"{direction} {name} {element} {kind} {device}", _tile_conv_kernel, signature, constants, options


CHANGING = ("rows", "blocks_m", "per_share")  # with the mask: never constants


def split_ones(values, signature, constants):
    """Enter whole numbers the way a launch does: 1 is a constant to the compiler, everything else a variable."""
    for name, value in values.items():
        if value == 1 and name not in CHANGING:
            constants[name] = 1
        else:
            signature[name] = "i32"
