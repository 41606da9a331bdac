"""A norm's output that a convolution needs in its backward pass is computed again, bit for bit, instead of kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mwm
from mwm.sparse import recompute

ACTIVE = torch.tensor([[[1, 0, 1], [0, 1, 1]], [[0, 0, 1], [1, 0, 0]]], dtype=torch.bool)


@pytest.fixture(autouse=True)
def small_maps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "LEAST_BYTES", 0)


def chain() -> nn.Module:
    torch.manual_seed(0)
    return mwm.sparsify(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)))


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    net(mwm.pack(leaf, ACTIVE)).tiles.square().sum().backward()
    found = [leaf.grad, *(p.grad for p in net.parameters())]
    net.zero_grad()
    return found


def test_gradients_have_the_same_bits_as_with_everything_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = chain(), torch.randn(2, 3, 16, 24)
    spared = gradients(net, x)
    monkeypatch.setattr(recompute, "_occupied", lambda: True)
    assert all(torch.equal(a, b) for a, b in zip(spared, gradients(net, x), strict=True))


def test_each_convolution_after_a_norm_keeps_a_recipe_and_runs_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, computed = [], []
    hooks, compute = torch.autograd.graph.saved_tensors_hooks, recompute.Recipe.compute

    def noting(pack, unpack):
        def note(tensor: Tensor):
            kept.append(pack(tensor))
            return kept[-1]

        return hooks(note, unpack)

    def computing(recipe: recompute.Recipe) -> Tensor:
        computed.append(recipe.activation)
        return compute(recipe)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", noting)
    monkeypatch.setattr(recompute.Recipe, "compute", computing)
    net = chain()
    out = net(mwm.pack(torch.randn(2, 3, 16, 24, requires_grad=True), ACTIVE))
    assert sum(not isinstance(entry, Tensor) for entry in kept) == 2, "one for the 1x1, one for the last 3x3, none for the first"
    assert computed == []
    out.tiles.sum().backward()
    assert computed == [None, "relu"]


def test_small_maps_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(recompute.Recipe, "compute", lambda recipe: pytest.fail("computed again"))
    chain()(mwm.pack(torch.randn(2, 3, 16, 24), ACTIVE)).tiles.sum().backward()


def test_a_weight_changed_before_backward_is_refused() -> None:
    net = chain()
    out = net(mwm.pack(torch.randn(2, 3, 16, 24), ACTIVE)).tiles.sum()
    with torch.no_grad():
        net[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (in place|by an inplace)"):
        out.backward()


def test_second_derivatives_go_through_the_recomputed_map() -> None:
    net = mwm.sparsify(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))).double()
    active = torch.ones(1, 1, 2, dtype=torch.bool)
    x = torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: net(mwm.pack(x, active)).tiles, (x,))


def test_hooks_of_the_caller_come_first() -> None:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        chain()(mwm.pack(torch.randn(2, 3, 16, 24), ACTIVE))
    assert kept.count(int(ACTIVE.sum()) * 8 * 8 * 8) >= 4, "both norms' inputs and outputs"


def test_a_maps_gradient_is_packed_when_its_layers_turn_comes_in_backward() -> None:
    order = []
    net = mwm.sparsify(nn.ModuleList([nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)]))
    a = net[0](mwm.pack(torch.randn(1, 1, 8, 8), torch.ones(1, 2, 2, dtype=torch.bool)))
    b = net[1](a)
    maps = [a.unpack(), b.unpack()]
    b.tiles.grad_fn.register_hook(lambda *_: order.append("deep layer"))
    maps[0].grad_fn.register_hook(lambda *_: order.append("shallow map"))
    sum(m.sum() for m in maps).backward()
    assert order == ["deep layer", "shallow map"]
