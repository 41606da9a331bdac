from __future__ import annotations

import copy
import pickle
import warnings

import harness
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

from mwm import ops

MASKS = harness.masks()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", MASKS)
def test_plan_numbers_the_visible_patches_in_row_major_order(name: str, backend: str) -> None:
    active = MASKS[name]
    plan = ops.build_plan(active, 32, backend=backend)
    assert plan.coords.tolist() == active.nonzero().tolist()
    assert plan.num_tiles == int(active.sum())
    assert plan.grid == tuple(active.shape[1:])
    assert plan.batch_size == active.shape[0]
    for n, (b, r, c) in enumerate(plan.coords.tolist()):
        assert plan.slots[b, r, c] == n
    assert int((plan.slots == -1).sum()) == int((~active).sum())
    assert plan.offsets.tolist() == [0, *active.flatten(1).sum(1).cumsum(0).tolist()]
    assert plan.image_index().tolist() == active.nonzero()[:, 0].tolist()
    assert {t.dtype for t in plan.tensors()[1:]} == {torch.int32}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_wrong_visible_is_a_value_error_that_names_the_image(backend: str) -> None:
    active = torch.zeros((3, 2, 2), dtype=torch.bool)
    active[:, 0] = True
    assert ops.build_plan(active, 4, visible=2, backend=backend).visible == 2
    active[1, 1, 1] = True
    with pytest.raises(ValueError, match=r"got 2, but image 1 has 3"):
        ops.build_plan(active, 4, visible=2, backend=backend)
    with pytest.raises(ValueError, match="between 0 and the 4 patches"):
        ops.build_plan(active, 4, visible=5, backend=backend)


def test_strided_masks_are_read_right() -> None:
    active = MASKS["mixed"]
    other = active.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert other.stride() != active.stride()
    assert torch.equal(ops.build_plan(other, 4).coords, ops.build_plan(active, 4).coords)


def test_wrong_masks_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="active must be a bool tensor"):
        ops.build_plan(torch.zeros(1, 2, 2), 4)
    with pytest.raises(ValueError, match=r"\[B, Gh, Gw\]"):
        ops.build_plan(torch.zeros((2, 2), dtype=torch.bool), 4)
    with pytest.raises(ValueError, match="patch_size"):
        ops.build_plan(torch.zeros((1, 2, 2), dtype=torch.bool), 0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck itself asks for it
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str) -> None:
    torch.library.opcheck(torch.ops.mwm.build_plan.default, (torch.ones((2, 3, 3), dtype=torch.bool), 9, backend))
    torch.library.opcheck(torch.ops.mwm.build_plan.default, (MASKS["mixed"], -1, backend))


def test_plan_is_frozen_copied_pickled_and_a_pytree() -> None:
    plan = ops.build_plan(MASKS["mixed"], 4)
    with pytest.raises(AttributeError):
        plan.patch_size = 8
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan)), plan.to("cpu")):
        assert torch.equal(other.slots, plan.slots)
    leaves, spec = _pytree.tree_flatten(plan)
    assert len(leaves) == 4
    assert _pytree.tree_unflatten(leaves, spec).patch_size == 4


def _network(x: Tensor, plan: ops.TilePlan) -> Tensor:
    tiles = torch.relu(ops.pack_tiles(x, plan) * 2)
    tiles = ops.tile_pool(tiles, plan, kernel_size=3, stride=2, padding=1)
    tiles = tiles * ops.image_expand(ops.image_sum(tiles, plan), plan)[:, :, None, None]
    return ops.unpack_tiles(tiles, plan)


def _masks(count: int, batch: int = 3) -> Tensor:
    active = torch.zeros((batch, 12), dtype=torch.bool)
    active[:, :count] = True
    return active.reshape(batch, 3, 4)


@pytest.mark.parametrize("visible", [True, False])
def test_fullgraph_compile_with_the_plan_inside_equals_eager(visible: bool) -> None:
    torch._dynamo.reset()

    def run(x: Tensor, active: Tensor) -> Tensor:
        return _network(x, ops.build_plan(active, 8, visible=5 if visible else None))

    x = torch.randn(3, 2, 24, 32, requires_grad=True)
    active = _masks(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(run, fullgraph=True)
        out = compiled(x, active)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
    expected = run(x, active)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, expected_grad)
    if visible:
        with pytest.raises(ValueError, match="visible"):
            compiled(x, _masks(6))


def test_plans_of_different_size_compile_at_most_twice() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_network, fullgraph=True, backend=counter)
    x = torch.randn(3, 2, 24, 32, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for count in (5, 6, 3, 9, 7):
            plan = ops.build_plan(_masks(count), 8)
            torch.testing.assert_close(compiled(x, plan), _network(x, plan))
    assert counter.frame_count <= 2
