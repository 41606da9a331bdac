from __future__ import annotations

import harness
import pytest
import torch
from torch import Tensor

from mwm import ops
from mwm.ops import reference

MASKS = harness.masks()
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _tiles(plan: ops.TilePlan, channels: int = 5, edge: int = 3) -> Tensor:
    return torch.randn(plan.num_tiles, channels, edge, edge, dtype=torch.float64)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_sum_over_the_visible_positions_of_each_image(name: str, dtype: torch.dtype, isa: str) -> None:
    active = MASKS[name]
    plan = ops.build_plan(active, 3)
    tiles = _tiles(plan, 70).to(dtype)
    found = ops.image_sum(tiles, plan)
    dense = reference.unpack_tiles(tiles.double(), active)
    truth = dense.sum((2, 3))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    scale = dense.abs().sum((2, 3))
    assert ((found - truth).abs() <= torch.finfo(found.dtype).eps * scale).all()
    torch.testing.assert_close(ops.image_sum(tiles, plan, backend="reference"), found, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS)
def test_integers_are_summed_exactly_and_strides_do_not_matter(dtype: torch.dtype, isa: str) -> None:
    plan = ops.build_plan(MASKS["mixed"], 4)
    tiles = harness.integers((plan.num_tiles, 9, 4, 4), torch.Generator().manual_seed(0)).to(dtype)
    truth = reference.image_sum(tiles.double(), MASKS["mixed"])
    for other in (tiles, tiles.contiguous(memory_format=torch.channels_last), tiles.transpose(2, 3)):
        assert torch.equal(ops.image_sum(other, plan).double(), truth)


@pytest.mark.parametrize("name", MASKS)
def test_expand_gives_each_tile_the_row_of_its_image(name: str) -> None:
    plan = ops.build_plan(MASKS[name], 3)
    y = torch.randn(plan.batch_size, 5)
    assert torch.equal(ops.image_expand(y, plan), y[plan.image_index()])
    assert torch.equal(ops.image_expand(y, plan, backend="reference"), y[plan.image_index()])


@pytest.mark.parametrize("name", MASKS)
def test_each_is_the_adjoint_of_the_other(name: str) -> None:
    plan = ops.build_plan(MASKS[name], 3)
    tiles, y = _tiles(plan), torch.randn(plan.batch_size, 5, dtype=torch.float64)
    left = (ops.image_sum(tiles, plan) * y).sum()
    right = (tiles * ops.image_expand(y, plan)[:, :, None, None]).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend: str) -> None:
    plan = ops.build_plan(MASKS["mixed"], 2)
    tiles = _tiles(plan, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: ops.image_sum(t, plan, backend=backend), tiles)
    assert torch.autograd.gradgradcheck(lambda t: ops.image_sum(t, plan, backend=backend).square(), tiles)
    y = torch.randn(plan.batch_size, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: ops.image_expand(y, plan, backend=backend), y)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck itself asks for it
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype: torch.dtype, backend: str) -> None:
    plan = ops.build_plan(MASKS["mixed"], 2)
    tiles = _tiles(plan).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.mwm.image_sum.default, (tiles, *plan.tensors(), backend))
    y = torch.randn(plan.batch_size, 5).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.mwm.image_expand.default, (y, *plan.tensors(), backend))


def test_a_long_float32_sum_is_as_good_as_torchs() -> None:
    """Errors are measured, not assumed: all positive values, 200,704 of them."""
    plan = ops.build_plan(torch.ones((1, 7, 7), dtype=torch.bool), 64)
    tiles = torch.rand(49, 8, 64, 64)
    truth = tiles.double().sum((0, 2, 3))
    ours = (ops.image_sum(tiles, plan)[0] - truth).abs().max()
    torchs = (tiles.sum((0, 2, 3)) - truth).abs().max()
    assert ours <= 2 * torchs + torch.finfo(torch.float32).eps * truth.max()


def test_sums_are_bitwise_equal_for_any_number_of_threads() -> None:
    plan = ops.build_plan(MASKS["square 7"], 8)
    tiles = torch.randn(plan.num_tiles, 200, 8, 8)
    results = []
    for count in (1, 2, 3, 1):
        with harness.num_threads(count):
            results.append(ops.image_sum(tiles, plan))
    assert all(torch.equal(result, results[0]) for result in results)


def test_wrong_shapes_are_refused() -> None:
    plan = ops.build_plan(MASKS["mixed"], 2)
    with pytest.raises(ValueError, match=r"image_expand: y must be \[B, C\] with B = 4"):
        ops.image_expand(torch.zeros(3, 2), plan)
    with pytest.raises(ValueError, match="image_sum: tiles must have T"):
        ops.image_sum(torch.zeros(1, 2, 2, 2), plan)
