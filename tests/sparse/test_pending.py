"""A batch norm waits for what follows it; nobody may be able to tell, except by the clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mwm
from mwm.sparse import Packed


def _maps(channels: int = 6) -> tuple[Packed, Packed]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(3, channels, 16, 16, generator=generator, dtype=torch.float64)
    active = torch.rand(3, 4, 4, generator=generator) < 0.6
    x = mwm.pack(images, active)
    tiles = x.tiles.clone(memory_format=torch.channels_last).requires_grad_()
    other = torch.randn(tiles.shape, generator=generator, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    return Packed(tiles, x.plan), Packed(other, x.plan)


def _norm(channels: int = 6) -> nn.BatchNorm2d:
    torch.manual_seed(0)
    norm = mwm.sparsify(nn.BatchNorm2d(channels).double().train())
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def _add_in_place(x: Packed, y: Packed) -> Packed:
    x += y
    return x


CHAINS: dict[str, Callable] = {
    "norm": lambda n, x, s: n(x),
    "relu": lambda n, x, s: F.relu(n(x)),
    "relu in place": lambda n, x, s: F.relu(n(x), inplace=True),
    "relu6": lambda n, x, s: F.relu6(n(x)),
    "relu6 module": lambda n, x, s: nn.ReLU6(inplace=True)(n(x)),
    "hardtanh": lambda n, x, s: F.hardtanh(n(x), -1.0, 1.0),
    "module": lambda n, x, s: nn.ReLU(inplace=True)(n(x)),
    "method": lambda n, x, s: n(x).relu(),
    "plus": lambda n, x, s: n(x) + s,
    "reflected": lambda n, x, s: (s + n(x)).relu_(),
    "residual": lambda n, x, s: torch.relu(_add_in_place(n(x), s)),
    "itself": lambda n, x, s: F.relu(n(x) + x),
    "two norms": lambda n, x, s: F.relu(n(x) + n(s)),
    "three maps": lambda n, x, s: F.relu(n(x) + s + s),
    "scaled": lambda n, x, s: F.relu(n(x).add(s, alpha=2)),
    "number": lambda n, x, s: F.relu(n(x) + 1),
    "twice": lambda n, x, s: _twice(n(x)),
    "gelu": lambda n, x, s: F.gelu(n(x)),
}


def _twice(y: Packed) -> Packed:
    return F.relu(y) + y


@pytest.mark.parametrize("chain", CHAINS)
def test_every_chain_gives_what_torch_gives_on_the_tiles(chain: str) -> None:
    x, s = _maps()
    ours, torchs = _norm(), _norm()
    out = CHAINS[chain](ours, x, s).tiles
    tiles, other = (t.tiles.detach().clone().requires_grad_() for t in (x, s))
    want = CHAINS[chain](torchs, tiles, other)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(want)
    leaves = [x.tiles, s.tiles, *ours.parameters()]
    truths = [tiles, other, *torchs.parameters()]
    for mine, true in zip(torch.autograd.grad(out, leaves, grad, allow_unused=True), torch.autograd.grad(want, truths, grad, allow_unused=True), strict=True):
        if true is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)
    for mine, true in zip(ours.buffers(), torchs.buffers(), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


def test_reading_shape_and_dtype_computes_nothing_and_reading_tiles_computes_once() -> None:
    x, _ = _maps()
    y = _norm()(x)
    assert y._pending is not None and y.shape == x.shape and y.dtype == x.dtype and y.dim() == 4 and "float64" in repr(y)
    assert y._pending is not None
    assert y.tiles is y.tiles and y._pending is None


def test_a_write_to_what_is_still_to_be_read_is_refused() -> None:
    x, s = _maps()
    waiting = _norm()(x) + s
    with torch.no_grad():
        s.tiles.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified in place\. Write to a copy"):
        F.relu(waiting)


def test_without_a_graph_nothing_waits() -> None:
    x, _ = _maps()
    with torch.no_grad():
        y = _norm()(x)
        assert y._pending is None
        want = _norm()(x.tiles.clone())
        x.tiles.zero_()
    torch.testing.assert_close(y.tiles, want, rtol=1e-12, atol=1e-12)


def test_hooks_see_the_norms_result() -> None:
    x, _ = _maps()
    norm, seen = _norm(), []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output.tiles.detach().clone()))
    F.relu(norm(x), inplace=True)
    torch.testing.assert_close(seen[0], _norm()(x.tiles).detach(), rtol=1e-12, atol=1e-12)


def test_statistics_move_although_nobody_reads_the_result() -> None:
    x, _ = _maps()
    norm = _norm()
    norm(x)
    assert int(norm.num_batches_tracked) == 1 and norm.running_mean.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_maps_keep_their_type(dtype: torch.dtype) -> None:
    x, s = _maps()
    norm = _norm().float()
    half = Packed(x.tiles.detach().to(dtype).requires_grad_(), x.plan)
    out = F.relu(norm(half) + Packed(s.tiles.detach().to(dtype), s.plan))
    assert out.dtype == dtype
    want = F.relu(_norm()(x.tiles) + s.tiles)
    assert (out.tiles - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()


def test_a_norm_of_one_value_keeps_its_rule() -> None:
    norm = _norm()
    tiles = torch.randn(1, 6, 1, 1, dtype=torch.float64, requires_grad=True)
    plan = mwm.pack(torch.zeros(1, 6, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool)).plan
    out: Tensor = F.relu(norm(Packed(tiles, plan))).tiles
    torch.testing.assert_close(out.flatten(), F.relu(norm.bias), rtol=1e-12, atol=1e-12)
