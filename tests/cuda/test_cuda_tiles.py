"""Packing, pooling and sums over images of the CUDA sources, against the reference and torch's dense ops."""

from __future__ import annotations

import harness
import pytest
import torch
import torch.nn.functional as F
from emulator import Target
from torch import Tensor

from mwm import ops
from mwm.ops import reference

MASKS = harness.masks()
HALVES = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float64, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.int8, torch.complex64]


def _plan(name: str, edge: int, target: Target) -> ops.TilePlan:
    return ops.build_plan(MASKS[name], edge, backend="reference").to(target.device)


def _same(mine: Tensor, other: Tensor) -> bool:
    return mine.dtype == other.dtype and torch.equal(mine.cpu(), other.cpu())


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("channels", "edge"), [(1, 4), (3, 2), (8, 1), (5, 3), (64, 8), (16, 5)])
def test_packing_equals_the_reference_for_any_memory_order(name: str, channels: int, edge: int, target: Target) -> None:
    target.require("pack_tiles")
    plan = _plan(name, edge, target)
    batch, rows, columns = plan.active.shape
    x = torch.randn(batch, channels, rows * edge, columns * edge)
    orders = [x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3), torch.randn(*x.shape, 2)[..., 1]]
    for given in orders:
        expected = reference.pack_tiles(given, plan.active.cpu())
        tiles = ops.pack_tiles(given.to(target.device), plan, backend=target.backend)
        assert _same(tiles, expected)
        for packed in (tiles, tiles.contiguous(), tiles.transpose(2, 3)):
            found = ops.unpack_tiles(packed, plan, -1.5, backend=target.backend)
            assert _same(found, reference.unpack_tiles(packed.cpu(), plan.active.cpu(), -1.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_moves_every_dtype(dtype: torch.dtype, target: Target) -> None:
    target.require("pack_tiles", dtype)
    plan = _plan("mixed", 4, target)
    fill = 1 if dtype == torch.bool else 2.5 if dtype.is_floating_point or dtype.is_complex else 3
    for channels in (1, 3, 16):
        x = torch.randint(0, 100, (4, channels, 12, 20)).to(dtype)
        for given in (x, x.contiguous(memory_format=torch.channels_last), torch.cat([x, x])[4:].contiguous(memory_format=torch.channels_last)):
            tiles = ops.pack_tiles(given.to(target.device), plan, backend=target.backend)
            assert _same(tiles, reference.pack_tiles(given, MASKS["mixed"]))
            assert _same(ops.unpack_tiles(tiles, plan, fill, backend=target.backend), reference.unpack_tiles(tiles.cpu(), MASKS["mixed"], fill))


def test_memory_that_is_not_aligned_to_16_bytes_is_packed_in_smaller_units(target: Target) -> None:
    target.require("pack_tiles", torch.bfloat16)
    plan = _plan("mixed", 4, target)
    storage = torch.randn(4 * 12 * 20 * 8 + 8).to(torch.bfloat16).to(target.device)
    for shift in range(1, 8):
        x = storage[shift : shift + 4 * 12 * 20 * 8].view(4, 12, 20, 8).permute(0, 3, 1, 2)
        assert _same(ops.pack_tiles(x, plan, backend=target.backend), reference.pack_tiles(x.cpu(), MASKS["mixed"]))


def test_hidden_nan_never_reaches_a_tile(target: Target) -> None:
    target.require("pack_tiles")
    plan = _plan("mixed", 4, target)
    hidden = ~reference.spread(MASKS["mixed"], 4)
    x = torch.randn(4, 6, 12, 20).masked_fill(hidden, torch.nan).to(target.device).requires_grad_()
    tiles = ops.pack_tiles(x, plan, backend=target.backend)
    assert not tiles.isnan().any()
    (grad,) = torch.autograd.grad(tiles.square().sum(), x)
    assert (grad.cpu()[hidden.expand_as(grad)] == 0).all()


def test_offsets_beyond_two_to_the_31_elements_are_read_right(quick: Target) -> None:
    """Six gigabytes that are never touched but for the last tile, as memory is given page by page."""
    quick.require("pack_tiles", torch.uint8)
    active = torch.zeros((3, 1, 2), dtype=torch.bool)
    active[2, 0, 1] = True
    plan = ops.build_plan(active, 4, backend="reference").to(quick.device)
    x = torch.empty(3 << 31, dtype=torch.uint8, device=quick.device).as_strided((3, 3, 4, 8), (1 << 31, 1, 1 << 28, 1 << 24))
    x[2, :, :, 4:] = torch.arange(48, dtype=torch.uint8, device=quick.device).reshape(3, 4, 4)
    tiles = ops.pack_tiles(x, plan, backend=quick.backend)
    assert torch.equal(tiles.cpu(), torch.arange(48, dtype=torch.uint8).reshape(1, 3, 4, 4))
    far = x[:, :, :, 4:]
    tile = ops.unpack_tiles(far, ops.build_plan(torch.ones((3, 1, 1), dtype=torch.bool), 4, backend="reference").to(quick.device), backend=quick.backend)
    assert torch.equal(tile[2].cpu(), torch.arange(48, dtype=torch.uint8).reshape(3, 4, 4))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_image_sums_are_those_of_the_dense_map(name: str, dtype: torch.dtype, target: Target) -> None:
    target.require("image_sum", dtype)
    plan = _plan(name, 3, target)
    for channels, edge in ((5, 3), (70, 8)):
        tiles = torch.randn(plan.num_tiles, channels, edge, edge).to(dtype)
        wide = reference.unpack_tiles(tiles.double(), MASKS[name])
        for given in (tiles, tiles.contiguous(memory_format=torch.channels_last), tiles.transpose(2, 3)):
            found = ops.image_sum(given.to(target.device), plan, backend=target.backend)
            assert found.dtype == torch.float32
            assert ((found.cpu() - wide.sum((2, 3))).abs() <= torch.finfo(torch.float32).eps * wide.abs().sum((2, 3))).all()


def _dense_pool(plan: ops.TilePlan, **s: object):
    def function(tiles: Tensor) -> Tensor:
        x, active = reference.unpack_tiles(tiles, plan.active), plan.active
        padding = s.get("padding", 0)
        if isinstance(padding, tuple) and len(padding) == 4:
            x, padding = F.pad(x, padding, value=float(s.get("pad_value", "-inf")) if s["mode"] == "max" else 0.0), 0
        stride, ceil = s.get("stride") or s["kernel_size"], s.get("ceil_mode", False)
        if s["mode"] == "max":
            out = F.max_pool2d(x, s["kernel_size"], stride, padding, s.get("dilation", 1), ceil_mode=ceil)
        else:
            out = F.avg_pool2d(x, s["kernel_size"], stride, padding, ceil, s.get("count_include_pad", True), s.get("divisor_override"))
        return reference.pack_tiles(out, active)

    return function


POOLS = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": (0, 1, 0, 1)},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": (5, 3), "stride": 1, "padding": (2, 1)},
    {"kernel_size": 13, "stride": 1, "padding": 6},  # over several tiles
]
ONLY_MAX = [{"kernel_size": 3, "stride": 2, "padding": (0, 1, 0, 1), "pad_value": 0.0}, {"kernel_size": 3, "stride": 1, "padding": 2, "dilation": 2, "_no_torch": True}]
ONLY_AVG = [{"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False}, {"kernel_size": 3, "stride": 1, "padding": 1, "divisor_override": 5}]
CASES = [("max", case) for case in [*POOLS, *ONLY_MAX]] + [("avg", case) for case in [*POOLS, *ONLY_AVG]]


@pytest.mark.parametrize(("mode", "case"), CASES, ids=str)
@pytest.mark.parametrize("channels", [3, 16])
def test_pooling_is_torchs_on_the_unpacked_map(mode: str, case: dict, channels: int, target: Target) -> None:
    target.require("tile_pool")
    plan = _plan("mixed", 4, target)
    settings = {"mode": mode, **{key: value for key, value in case.items() if not key.startswith("_")}}
    tiles = torch.randn(plan.num_tiles, channels, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rival = "reference" if "_no_torch" in case else None
    dense = (lambda t: ops.tile_pool(t, plan, backend=rival, **settings)) if rival else _dense_pool(plan, **settings)
    harness.check(lambda t: ops.tile_pool(t, plan, backend=target.backend, **settings), dense, [tiles.to(target.device)], threads=(1,))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_the_stems_pooling_is_right_for_every_mask_and_dtype(name: str, dtype: torch.dtype, quick: Target) -> None:
    quick.require("tile_pool", dtype)
    plan = _plan(name, 8, quick)
    tiles = harness.integers((plan.num_tiles, 64, 8, 8), torch.Generator().manual_seed(2), limit=9, density=0.8).to(dtype)
    tiles[tiles == 7] = torch.nan
    for mode in ("max", "avg"):
        settings = {"mode": mode, "kernel_size": 3, "stride": 2, "padding": 1}
        leaf, other = tiles.to(quick.device).requires_grad_(), tiles.clone().requires_grad_()
        found = ops.tile_pool(leaf, plan, backend=quick.backend, **settings)
        expected = ops.tile_pool(other, ops.build_plan(MASKS[name], 8), backend="cpu", **settings)
        assert torch.equal(found.detach().cpu().nan_to_num(99.0), expected.detach().nan_to_num(99.0))
        grad = torch.randint(-3, 4, found.shape).to(dtype)
        mine, theirs = torch.autograd.grad(found, leaf, grad.to(quick.device))[0], torch.autograd.grad(expected, other, grad)[0]
        assert torch.equal(mine.cpu(), theirs)
