"""Weight gradient of `tile_conv`: for each tap, (output's gradient)^T x (the input rows that the tap reads), in two stages.

Program <-> BLOCK_N filters x BLOCK_K channels of one tap (few channels: BLOCK_K pairs of tap and channel) x one share of the
positions. A program adds its share in order and writes one partial sum; a second kernel adds the shares in order. The number of
shares is a function of shapes and of the config table, so that results repeat bit for bit. Hidden neighbours are masked loads.
"""

import torch
import triton
import triton.language as tl
from mwm.kernels import conv_configs, launch
from mwm.kernels.tile_conv import check_sizes, layers, neighbour, split_ones

LEAST_BLOCKS = 4  # of positions in a share
MOST_PARTIAL = 2**26  # elements of all partial sums together, 256 MiB


@triton.jit(do_not_specialize=["rows", "per_share"])  # they change with every mask
def _tile_conv_weight_kernel(
    grad,  # packed rows [rows, groups * filters]
    source,  # packed rows [S * EDGE * EDGE, groups * depth]
    coords,  # of the tiles of grad [T, 3]
    slots,  # of the tiles of source [B, grid_h, grid_w]
    sums,  # [shares, groups * filters, KH * KW, depth]
    rows,
    grid_h,
    grid_w,
    depth,  # channels of one group, divided by ALIGN_IN as source_stride is
    filters,  # of one group, divided by ALIGN_OUT as grad_stride is
    grad_stride,
    source_stride,
    numel,  # elements of one share's partial sums
    groups,
    blocks_n,
    blocks_k,
    per_share,  # blocks of positions
    ALIGN_IN: tl.constexpr,
    ALIGN_OUT: tl.constexpr,
    EDGE: tl.constexpr,
    LATTICE: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    FLAT: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_N divides filters and BLOCK_K divides depth
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    depth *= ALIGN_IN
    source_stride *= ALIGN_IN
    filters *= ALIGN_OUT
    grad_stride *= ALIGN_OUT
    pid = tl.program_id(0)
    block_n = pid % blocks_n
    block_k = pid // blocks_n % blocks_k
    group = pid // (blocks_n * blocks_k) % groups
    share = pid // (blocks_n * blocks_k) // groups
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    if FLAT:
        k = block_k * BLOCK_K + ks
        place = k // depth
        c = k - place * depth
        good_k = place < KH * KW
        place = tl.where(good_k, place, 0)
    else:
        # Taps are the inner index: programs that run side by side read the same rows.
        place = block_k % (KH * KW)
        c = block_k // (KH * KW) * BLOCK_K + ks
        good_k = c < depth
    dy = place // KW * DH - TOP
    dx = place % KW * DW - LEFT
    grad += group.to(tl.int64) * filters
    source += group.to(tl.int64) * depth
    height = grid_h * EDGE
    width = grid_w * EDGE
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for block in range(share * per_share, share * per_share + per_share):
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = m < rows
        tile = m // (LATTICE * LATTICE)
        image = tl.load(coords + tile * 3, mask=valid, other=0)
        y = tl.load(coords + tile * 3 + 1, mask=valid, other=0) * EDGE + m % (LATTICE * LATTICE) // LATTICE * STRIDE
        x = tl.load(coords + tile * 3 + 2, mask=valid, other=0) * EDGE + m % LATTICE * STRIDE
        base = image * (grid_h * grid_w)
        if FLAT:
            row, seen = neighbour(slots, base[:, None], y[:, None] + dy[None, :], x[:, None] + dx[None, :], valid[:, None] & good_k[None, :],
                                  height, width, grid_w, EDGE)
            at = row.to(tl.int64) * source_stride + c[None, :]
            mask_n = (n < filters)[:, None] & valid[None, :]
        else:
            row, seen = neighbour(slots, base, y + dy, x + dx, valid, height, width, grid_w, EDGE)
            at = row.to(tl.int64)[:, None] * source_stride + c[None, :]
            seen = seen[:, None]
            mask_n = valid[None, :]
            if not EVEN:
                seen = seen & good_k[None, :]
                mask_n = mask_n & (n < filters)[:, None]
        a = tl.load(grad + (m.to(tl.int64)[None, :] * grad_stride + n[:, None]), mask=mask_n, other=0.0)
        b = tl.load(source + at, mask=seen, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    at = share.to(tl.int64) * numel + (group * filters + n).to(tl.int64)[:, None] * (KH * KW * depth) + (place * depth + c)[None, :]
    tl.store(sums + at, acc.to(sums.dtype.element_ty), mask=(n < filters)[:, None] & good_k[None, :])


@triton.jit(do_not_specialize=["shares"])
def _sum_shares_kernel(sums, out, numel, shares, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    sums += at
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(shares):
        total += tl.load(sums, mask=inside, other=0.0)
        sums += numel
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def grad_weight(grad, x, coords, slots, geometry, out, *, tf32=False, config=None):
    """The transpose of `tile_conv.forward` in weight.

    Args:
        grad: Packed tiles, channels-last. float32 | bfloat16 | float16 [T, K, t // s, t // s]
        x: Packed tiles, channels-last, same dtype. [S, C, t, t]
        coords: Where the tiles of grad lie. int32 [T, 3]
        slots: Where the tiles of x lie. int32 [B, Gh, Gw]
        geometry: [stride, dilation of rows, of columns, padding left, right, top, bottom, groups]
        out: Receives the result, channels-last memory; summed in float32, rounded once. [K, C // groups, kh, kw]
        tf32, config: As in `tile_conv.forward`.

    Returns:
        As `tile_conv.forward`, of the first stage.
    """
    if out.numel() == 0 or grad.numel() == 0 or x.numel() == 0:
        out.zero_()
        return None
    key = (grad.shape, x.shape, out.shape, slots.shape, tuple(geometry), tf32, x.dtype, x.device, None if config is None else tuple(config.items()))
    shares = _described(*key)[3]
    sums = out if shares == 1 else torch.empty((shares, out.numel()), dtype=torch.float32, device=out.device)
    compiled = _WEIGHT((grad, x, coords, slots, sums), key)
    if shares > 1:
        sum_shares(sums, out)
    return compiled


@launch.remembered
def _described(grad, x, out, slots, geometry, tf32, dtype, device, config):
    """What follows from the shapes: (grid, numbers and constants by name, options, number of shares)."""
    grid, sizes, constants, options = plan_launch(grad, x, out, geometry, conv_configs.kind_of(dtype, tf32), conv_configs.device_name(device),
                                                  None if config is None else dict(config))
    check_sizes(x, out, grad, slots, grid[0])
    values = dict(zip(("rows", "depth", "filters", "groups", "blocks_n", "blocks_k", "shares", "per_share"), sizes, strict=True))
    shares = values.pop("shares")
    values |= dict(grid_h=slots[1], grid_w=slots[2], grad_stride=grad[1] // constants["ALIGN_OUT"], source_stride=x[1] // constants["ALIGN_IN"],
                   numel=out[0] * out[1] * out[2] * out[3])
    return grid, values | constants | dict(PRECISION="tf32" if tf32 else "ieee"), options, shares


_WEIGHT = launch.Launcher(_tile_conv_weight_kernel, lambda *key: _described(*key)[:3])


def sum_shares(sums, out):
    """Add partial sums in order. float32 [shares, numel] -> out, as it lies in memory"""
    _SUM((sums, out), (*sums.shape, out.dtype, out.device))


_SUM = launch.Launcher(_sum_shares_kernel, lambda shares, numel, dtype, device: ((-(-numel // 512),), dict(numel=numel, shares=shares, BLOCK=512), dict(num_warps=4)))


def plan_launch(grad_shape, x_shape, out_shape, geometry, kind, device, config=None):
    """(grid, runtime sizes, constants, options) of a launch: a pure function of shapes, kind of numbers and device name."""
    stride, dilation_h, dilation_w, left, _, top, _, groups = geometry
    kernel_h, kernel_w = out_shape[2:]
    lattice = grad_shape[2]
    rows = grad_shape[0] * lattice * lattice
    filters, depth = grad_shape[1] // groups, out_shape[1]
    flat = depth < conv_configs.LEAST_CHUNK
    aligned = conv_configs.alignment(depth, x_shape[1]), conv_configs.alignment(filters, grad_shape[1])
    config = config or conv_configs.pick("tile_conv", "grad_weight", kind, rows, filters, depth, device, not flat and min(aligned) == 1)
    taps = kernel_h * kernel_w
    blocks_n = -(-filters // config["block_n"])
    blocks_k = -(-taps * depth // config["block_k"]) if flat else taps * -(-depth // config["block_k"])
    shares, per_share = shares_of(-(-rows // config["block_m"]), blocks_n * blocks_k * groups, config["programs"], out_shape[0] * depth * taps)
    constants = dict(
        ALIGN_IN=aligned[0], ALIGN_OUT=aligned[1],
        EDGE=x_shape[2], LATTICE=lattice, KH=kernel_h, KW=kernel_w, STRIDE=stride, DH=dilation_h, DW=dilation_w, TOP=top, LEFT=left, FLAT=flat,
        EVEN=filters % config["block_n"] == 0 and depth % config["block_k"] == 0, BLOCK_N=config["block_n"], BLOCK_K=config["block_k"],
        BLOCK_M=config["block_m"],
    )
    sizes = (rows, depth // aligned[0], filters // aligned[1], groups, blocks_n, blocks_k, shares, per_share)
    return (blocks_n * blocks_k * groups * shares,), sizes, constants, dict(num_warps=config["num_warps"], num_stages=config["num_stages"])


def shares_of(blocks, programs, wanted, numel):
    """(number of shares, blocks in each): enough to reach `wanted` programs where the sums are not too short and not too large for it."""
    shares = max(1, min(-(-wanted // programs), blocks // LEAST_BLOCKS, MOST_PARTIAL // numel))
    per_share = -(-blocks // shares)
    return -(-blocks // per_share), per_share


def compile_cases(every=False):
    """(name, kernel, signature, constants, options), as `tile_conv.compile_cases`."""
    for name, x, weight, y, geometry, dtype, tf32, device in layers("grad_weight", every):
        kind, element = conv_configs.kind_of(dtype, tf32), conv_configs.ELEMENTS[dtype]
        _, sizes, constants, options = plan_launch(y, x, weight, geometry, kind, device)
        constants["PRECISION"] = "tf32" if tf32 else "ieee"
        signature = dict.fromkeys(("grad", "source"), f"*{element}") | {"coords": "*i32", "slots": "*i32"}
        signature["sums"] = "*fp32" if sizes[6] > 1 else f"*{element}"
        signature |= dict.fromkeys(("grid_h", "grid_w", "grad_stride", "source_stride", "numel"), "i32")
        names = ("rows", "depth", "filters", "groups", "blocks_n", "blocks_k", "shares", "per_share")
        values = dict(zip(names, sizes, strict=True))
        del values["shares"]
        split_ones(values, signature, constants)
        yield f"grad_weight {name} {element} {kind} {device}", _tile_conv_weight_kernel, signature, constants, options
    for element in conv_configs.ELEMENTS.values():
        signature = {"sums": "*fp32", "out": f"*{element}", "numel": "i32", "shares": "i32"}
        yield f"sum of shares {element}", _sum_shares_kernel, signature, {"BLOCK": 512}, {"num_warps": 4}
