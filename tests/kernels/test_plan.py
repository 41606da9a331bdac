"""Plans and image sums in Triton, against the oracle."""

from __future__ import annotations

import harness
import pytest
import torch
from torch import Tensor

from mwm import ops
from mwm.ops import reference

MASKS = harness.masks()


@pytest.mark.parametrize("name", MASKS)
def test_plans_equal_the_oracle(name: str, device: str) -> None:
    active = MASKS[name]
    plan = ops.build_plan(active.to(device), 4, backend="triton")
    for found, expected in zip(plan.tensors()[1:], reference.build_plan(active, -1), strict=True):
        assert torch.equal(found.cpu(), expected) and found.dtype == torch.int32


@pytest.mark.parametrize(("batch", "grid", "visible"), [(3, (7, 7), 20), (2, (3, 5), 0), (2, (1, 1), 1), (0, (3, 4), 5), (1, (40, 41), 900), (2, (2, 3), 6)])
def test_plans_of_a_known_count_need_no_look_at_the_mask(batch: int, grid: tuple[int, int], visible: int, device: str) -> None:
    patches = grid[0] * grid[1]
    active = (torch.rand(batch, patches).argsort(1) < visible).reshape(batch, *grid)
    other = active.transpose(1, 2).contiguous().transpose(1, 2)
    for mask in (active, other):
        plan = ops.build_plan(mask.to(device), 4, visible=visible, backend="triton")
        for found, expected in zip(plan.tensors()[1:], reference.build_plan(active, visible), strict=True):
            assert torch.equal(found.cpu(), expected)


def test_a_wrong_count_is_a_device_side_assertion_and_writes_nothing_beyond(refused: type[Exception]) -> None:
    active = torch.ones((2, 2, 3), dtype=torch.bool)
    with pytest.raises(refused, match="another number of visible patches"):
        ops.build_plan(active, 4, visible=5, backend="triton")


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("channels", "edge"), [(5, 2), (70, 3), (1, 1)])
def test_sums_and_gradients_equal_the_oracle(name: str, channels: int, edge: int, device: str) -> None:
    active = MASKS[name]
    plan = ops.build_plan(active, edge).to(device)
    x = harness.integers((plan.num_tiles, channels, edge, edge), torch.Generator().manual_seed(1))

    def op(tiles: Tensor) -> Tensor:
        return ops.image_sum(tiles.to(device), plan, backend="triton").cpu()

    for dtype in (torch.float32, torch.bfloat16, torch.float16) if edge == 2 else (torch.float32,):
        harness.check(op, lambda tiles: reference.image_sum(tiles, active), [x], dtype=dtype, exact=True, threads=(1,))


@pytest.mark.parametrize("name", ["mixed", "all hidden"])
def test_expanding_is_the_adjoint_of_summing(name: str, device: str) -> None:
    active = MASKS[name]
    plan = ops.build_plan(active, 2).to(device)
    y = harness.integers((active.shape[0], 6), torch.Generator().manual_seed(2))

    def op(rows: Tensor) -> Tensor:
        return ops.image_expand(rows.to(device), plan, backend="triton").cpu()

    harness.check(op, lambda rows: reference.image_expand(rows, active), [y], exact=True, threads=(1,))


def test_a_long_float32_sum_is_as_good_as_torchs(device: str) -> None:
    plan = ops.build_plan(torch.ones((1, 7, 7), dtype=torch.bool), 16).to(device)
    tiles = torch.rand(49, 8, 16, 16)
    truth = tiles.double().sum((0, 2, 3))
    ours = (ops.image_sum(tiles.to(device), plan, backend="triton")[0].cpu() - truth).abs().max()
    torchs = (tiles.sum((0, 2, 3)) - truth).abs().max()
    assert ours <= 2 * torchs + torch.finfo(torch.float32).eps * truth.max()
