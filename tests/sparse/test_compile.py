"""One graph under torch.compile, forward and backward, whatever the number of visible patches."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import mwm

TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
pytestmark = pytest.mark.skipif(TORCH < (2, 14), reason="dynamo traces the guarded sizes of packed maps from torch 2.14 on; older versions refuse to compile the net")


class SmallNet(nn.Module):
    """One layer of each kind that tiles need: wide, pointwise, strided and depthwise convolutions, pool, norms, squeeze-excite, view, cat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.pool = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.MaxPool2d(3, 2, 1)
        self.depthwise, self.group, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)
        self.last, self.linear = nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x):
        x = self.pool(nn.functional.relu(self.norm(self.stem(x)), inplace=True))
        y = self.group(self.depthwise(x)) * torch.sigmoid(self.point(x.mean((2, 3), keepdim=True)))
        batch, channels, height, width = y.shape
        y = y.view(batch, 2, channels // 2, height, width).transpose(1, 2).flatten(1, 2)
        z = self.linear(self.last(torch.cat([x, y], 1).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return [x, z]


def masks(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    active = [torch.rand(2, 3, 3, generator=generator) < share for share in torch.linspace(0.3, 0.9, count)]
    for mask in active:
        mask[:, 0, 0] = mask[:, 1, 1] = True
    return active


def loss(maps: list) -> torch.Tensor:
    return sum(x.tiles.square().mean() for x in maps)


def gradients(net: nn.Module) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("pack_inside", [False, True], ids=["packed-input", "pack-inside"])
def test_compiles_at_most_twice_and_agrees_with_eager(pack_inside: bool) -> None:
    net = mwm.sparsify(SmallNet()).train()
    twin = copy.deepcopy(net)
    counter = CompileCounterWithBackend("inductor")

    def step(module: nn.Module, images: torch.Tensor, active: torch.Tensor, packed: mwm.Packed) -> torch.Tensor:
        return loss(module(mwm.pack(images, active) if pack_inside else packed))

    compiled = torch.compile(lambda *args: step(net, *args), fullgraph=True, backend=counter)
    images = torch.randn(2, 1, 48, 48)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for active in masks(3):
            packed = mwm.pack(images, active)
            found, expected = compiled(images, active, packed), step(twin, images, active, packed)
            found.backward()
            expected.backward()
            assert torch.allclose(found, expected, rtol=1e-4)
            for a, b in zip(gradients(net), gradients(twin), strict=True):
                assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)
    assert counter.frame_count <= 2
    for a, b in zip(net.buffers(), twin.buffers(), strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-6)


def test_a_constant_count_of_visible_patches_compiles_once() -> None:
    net = mwm.sparsify(SmallNet()).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, a: net(mwm.pack(x, a, visible=3))[1].unpack(), fullgraph=True, backend=counter)
    for seed in range(3):
        order = torch.rand(2, 9, generator=torch.Generator().manual_seed(seed)).argsort(1)
        active = (order < 3).reshape(2, 3, 3)
        assert compiled(torch.randn(2, 1, 48, 48), active).shape == (2, 8, 12, 12)
    assert counter.frame_count == 1


def test_a_refusal_stays_a_refusal_under_compile() -> None:
    net = mwm.sparsify(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten()))
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    packed = mwm.pack(torch.randn(1, 1, 16, 16), torch.ones(1, 2, 2, dtype=torch.bool))
    with pytest.raises(Exception, match="flatten"):
        compiled(packed)
    with pytest.raises(Exception, match=r"Observed exception|height or width"):
        torch.compile(lambda x: x.sum((2, 3)) / (x.shape[2] * x.shape[3]), fullgraph=True, backend="eager")(packed)


def test_batch_norm_of_one_value_keeps_the_running_variance_under_compile() -> None:
    norm = mwm.sparsify(nn.BatchNorm2d(3)).train()
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    for count in (1, 2):
        active = torch.zeros(1, 2, 2, dtype=torch.bool)
        active[0, 0, :count] = True
        compiled(mwm.pack(torch.randn(1, 3, 2, 2), active))
        assert torch.equal(norm.running_var, torch.ones(3)) is (count == 1) and norm.running_var.isfinite().all()


def test_same_padding_and_sizes_of_other_maps_compile() -> None:
    class Same(nn.Module):
        def forward(self, x):
            rest = max((math.ceil(x.shape[-1] / 2) - 1) * 2 + 3 - x.shape[-1], 0)
            low = F.avg_pool2d(F.pad(x, (rest // 2, rest - rest // 2, rest // 2, rest - rest // 2)), 3, 2)
            return x + F.interpolate(low, size=x.shape[-2:])

    net = mwm.sparsify(Same())
    packed = mwm.pack(torch.randn(2, 1, 16, 16), torch.tensor([[[True, True], [True, False]]] * 2))
    assert torch.allclose(torch.compile(net, fullgraph=True, backend="eager")(packed).tiles, net(packed).tiles)
