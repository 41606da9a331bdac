"""Packing and unpacking in Triton: every value moves unchanged."""

from __future__ import annotations

import harness
import pytest
import torch
from torch import Tensor

from mwm import ops
from mwm.ops import reference

MASKS = harness.masks()
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.int8, torch.complex64]


def _dense(active: Tensor, edge: int, channels: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    batch, rows, columns = active.shape
    return torch.randn(batch, channels, rows * edge, columns * edge).mul(100).to(dtype)


def _plan(active: Tensor, edge: int, device: str) -> ops.TilePlan:
    return ops.build_plan(active, edge).to(device)


@pytest.mark.parametrize(("name", "edge", "channels"), [*((name, 3, 2) for name in MASKS), ("mixed", 1, 5), ("mixed", 4, 1), ("mixed", 2, 130)])
def test_pack_and_unpack_equal_the_oracle(name: str, edge: int, channels: int, device: str) -> None:
    active = MASKS[name]
    plan, x = _plan(active, edge, device), _dense(active, edge, channels)
    tiles = ops.pack_tiles(x.to(device), plan, backend="triton")
    assert torch.equal(tiles.cpu(), reference.pack_tiles(x, active))
    assert tiles.is_contiguous(memory_format=torch.channels_last)
    back = ops.unpack_tiles(tiles, plan, 2.5, backend="triton")
    assert torch.equal(back.cpu(), reference.unpack_tiles(tiles.cpu(), active, 2.5))
    assert back.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_moves_unchanged(dtype: torch.dtype, device: str) -> None:
    active = MASKS["mixed"]
    plan, x = _plan(active, 4, device), _dense(active, 4, dtype=dtype)
    back = ops.unpack_tiles(ops.pack_tiles(x.to(device), plan, backend="triton"), plan, 1, backend="triton").cpu()
    seen = active.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(x)
    assert back.dtype == dtype
    assert torch.equal(back, torch.where(seen, x, torch.ones((), dtype=dtype)))


def test_any_strides_give_the_same_tiles(device: str) -> None:
    active = MASKS["mixed"]
    plan, x = _plan(active, 4, device), _dense(active, 4, 6).to(device)
    wide = torch.full((*x.shape[:3], 2 * x.shape[3]), torch.nan, dtype=x.dtype, device=device)
    wide[..., ::2] = x
    flipped = x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    for other in (x, x.contiguous(memory_format=torch.channels_last), wide[..., ::2], flipped, x[:, :1].expand(-1, 6, -1, -1)):
        assert torch.equal(ops.pack_tiles(other, plan, backend="triton").cpu(), reference.pack_tiles(other.cpu(), active))
    tiles = ops.pack_tiles(x, plan, backend="triton")
    for other in (tiles.contiguous(), tiles.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0), tiles[:, :1].expand_as(tiles)):
        assert torch.equal(ops.unpack_tiles(other, plan, backend="triton").cpu(), reference.unpack_tiles(other.cpu(), active))


def test_each_is_the_adjoint_of_the_other(device: str) -> None:
    active = MASKS["mixed"]
    plan, x = _plan(active, 2, device), _dense(active, 2).to(device).requires_grad_()
    tiles = ops.pack_tiles(x, plan, backend="triton")
    weights = torch.randn_like(tiles)
    (grad,) = torch.autograd.grad(tiles, x, weights)
    assert torch.equal(grad.cpu(), reference.unpack_tiles(weights.cpu(), active))
    tiles = tiles.detach().requires_grad_()
    weights = torch.randn_like(x)
    (grad,) = torch.autograd.grad(ops.unpack_tiles(tiles, plan, backend="triton"), tiles, weights)
    assert torch.equal(grad.cpu(), reference.pack_tiles(weights.cpu(), active))


def test_hidden_nan_never_reaches_a_tile(device: str) -> None:
    active = MASKS["mixed"]
    x = torch.where(reference.spread(active, 3), _dense(active, 3), torch.nan)
    plan = _plan(active, 3, device)
    tiles = ops.pack_tiles(x.to(device), plan, backend="triton")
    assert not tiles.isnan().any()
    assert torch.equal(ops.unpack_tiles(tiles, plan, backend="triton").cpu(), x.nan_to_num(0.0))


def test_maps_beyond_2_31_elements_are_read_where_they_lie(device: str) -> None:
    """Only the pages that are touched exist: the last patch of a map of 4.3e9 values."""
    if device != "cpu":
        pytest.skip("the map of the test has memory on paper only; on a GPU it would need it")
    x = torch.empty(1 << 32, dtype=torch.uint8).reshape(2, 2, 1 << 15, 1 << 15)
    x[1, :, -2:, -2:] = torch.arange(8, dtype=torch.uint8).reshape(2, 2, 2)
    plan = ops.TilePlan(torch.zeros(0), torch.tensor([[1, (1 << 14) - 1, (1 << 14) - 1]], dtype=torch.int32), torch.zeros(0), torch.zeros(0), 2)
    out = torch.empty((1, 2, 2, 2), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    from mwm.ops import gpu

    gpu.triton_kernels("pack_tiles").pack_tiles(x, plan.coords, out)
    assert out.flatten().tolist() == list(range(8))
    tiles = torch.empty(1 << 32, dtype=torch.uint8).reshape(1 << 30, 1, 2, 2)
    tiles[-1, 0] = torch.arange(4, dtype=torch.uint8).reshape(2, 2)
    back = torch.empty((1, 1, 2, 4), dtype=torch.uint8)
    gpu.triton_kernels("pack_tiles").unpack_tiles(tiles, torch.tensor([[[-1, (1 << 30) - 1]]], dtype=torch.int32), 7.0, back)
    assert back.flatten().tolist() == [7, 7, 0, 1, 7, 7, 2, 3]
