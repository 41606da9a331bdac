"""Every op writes every element of its outputs, and reads nothing that is hidden."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import harness
import pytest
import torch
from torch import Tensor

from mwm import ops

MASKS = harness.masks()
Run = Callable[[ops.TilePlan], list[Tensor]]


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (largest integers) instead of whatever lay there."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def _with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    out = function(leaf)
    (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    return [out.detach(), grad]


def _tiles(plan: ops.TilePlan, channels: int = 5) -> Tensor:
    return torch.arange(plan.num_tiles * channels * 16, dtype=torch.float32).reshape(plan.num_tiles, channels, 4, 4).sin()


def _dense(plan: ops.TilePlan) -> Tensor:
    return torch.arange(plan.active.numel() * 32, dtype=torch.float32).reshape(plan.batch_size, 2, 4 * plan.grid[0], 4 * plan.grid[1]).sin()


def _sample(plan: ops.TilePlan) -> list[Tensor]:
    strata = plan.active.flatten(1).long()
    return [ops.sample_active(strata, ops.to_q32([0.3, 0.7]), grid=plan.grid, seed=0, ids=torch.arange(plan.batch_size), epoch=0)]


RUNS: dict[str, Run] = {
    "build_plan": lambda plan: list(ops.build_plan(plan.active, 4).tensors()),
    "pack_tiles": lambda plan: _with_gradient(lambda x: ops.pack_tiles(x, plan), _dense(plan)),
    "unpack_tiles": lambda plan: _with_gradient(lambda x: ops.unpack_tiles(x, plan), _tiles(plan)),
    "max pool": lambda plan: _with_gradient(lambda x: ops.tile_pool(x, plan, kernel_size=3, stride=2, padding=1), _tiles(plan)),
    "avg pool": lambda plan: _with_gradient(lambda x: ops.tile_pool(x, plan, mode="avg", kernel_size=3, stride=2, padding=1), _tiles(plan)),
    "image_sum": lambda plan: _with_gradient(lambda x: ops.image_sum(x, plan), _tiles(plan)),
    "image_expand": lambda plan: _with_gradient(lambda y: ops.image_expand(y, plan), torch.ones(plan.batch_size, 5)),
    "conv 3x3": lambda plan: _with_gradient(lambda x: ops.tile_conv(x, torch.ones(4, 5, 3, 3), torch.ones(4), plan, padding=1), _tiles(plan)),
    "depthwise": lambda plan: _with_gradient(lambda x: ops.tile_conv(x, torch.ones(5, 1, 7, 7), None, plan, padding=3, groups=5), _tiles(plan)),
    "conv weight": lambda plan: _with_gradient(lambda w: ops.tile_conv(_tiles(plan), w, None, plan, padding=1, stride=2), torch.ones(4, 5, 3, 3)),
    "sample_active": _sample,
    "random_words": lambda plan: [ops.random_words(0, torch.arange(plan.batch_size), 0, 0, 16, 9)],
    "region_coverage": lambda plan: list(ops.region_coverage(_dense(plan)[:, 0].abs(), plan.grid)),
}


@pytest.mark.parametrize("op", RUNS)
@pytest.mark.parametrize("name", ["mixed", "single tile", "all hidden", "no image"])
def test_every_element_is_written(op: str, name: str, isa: str, poisoned_memory: None) -> None:
    plan = ops.build_plan(MASKS[name], 4)
    found = RUNS[op](plan)
    assert not any(out.isnan().any() for out in found if out.is_floating_point())
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(out, again) for out, again in zip(found, RUNS[op](plan), strict=True))


@pytest.mark.parametrize("op", ["max pool", "avg pool", "conv 3x3", "depthwise", "image_sum"])
def test_hidden_nan_never_reaches_a_visible_output(op: str, isa: str) -> None:
    """The dense map is NaN wherever it is hidden; what lies beyond a tile's edge must not be read from there."""
    plan = ops.build_plan(MASKS["mixed"], 4)
    dense = ops.unpack_tiles(_tiles(plan), plan, fill=float("nan"))
    packed = ops.pack_tiles(dense, plan)
    clean = ops.pack_tiles(dense.nan_to_num(0.0), plan)
    run = {
        "max pool": lambda x: ops.tile_pool(x, plan, kernel_size=3, stride=1, padding=1),
        "avg pool": lambda x: ops.tile_pool(x, plan, mode="avg", kernel_size=3, stride=1, padding=1),
        "conv 3x3": lambda x: ops.tile_conv(x, torch.ones(4, 5, 3, 3), None, plan, padding=1),
        "depthwise": lambda x: ops.tile_conv(x, torch.ones(5, 1, 7, 7), None, plan, padding=3, groups=5),
        "image_sum": lambda x: ops.image_sum(x, plan),
    }[op]
    assert torch.equal(run(packed), run(clean))
