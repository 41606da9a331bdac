from __future__ import annotations

import harness
import pytest
import torch
from torch import Tensor

from mwm import ops
from mwm.ops import reference

MASKS = harness.masks()
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _dense(active: Tensor, edge: int, channels: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    batch, rows, columns = active.shape
    return torch.randn(batch, channels, rows * edge, columns * edge).to(dtype)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("edge", [1, 3, 4])
def test_pack_equals_the_reference_on_every_isa(name: str, edge: int, isa: str) -> None:
    active = MASKS[name]
    plan = ops.build_plan(active, edge)
    x = _dense(active, edge)
    tiles = ops.pack_tiles(x, plan)
    assert torch.equal(tiles, reference.pack_tiles(x, active))
    assert tiles.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ops.unpack_tiles(tiles, plan, 2.5), reference.unpack_tiles(tiles, active, 2.5))


@pytest.mark.parametrize("name", ["mixed", "single tile", "square 7"])
def test_packing_one_channel_at_a_time_finds_every_pixel(name: str) -> None:
    """Impulses: each pixel carries its own number, so a swapped index cannot hide."""
    active = MASKS[name]
    batch, rows, columns = active.shape
    x = torch.arange(batch * 2 * rows * 3 * columns * 3, dtype=torch.int64).reshape(batch, 2, rows * 3, columns * 3)
    plan = ops.build_plan(active, 3)
    tiles = ops.pack_tiles(x, plan)
    for n, (b, r, c) in enumerate(plan.coords.tolist()):
        assert torch.equal(tiles[n], x[b, :, 3 * r : 3 * r + 3, 3 * c : 3 * c + 3])


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool])
def test_every_dtype_moves_unchanged(dtype: torch.dtype) -> None:
    active = MASKS["mixed"]
    plan = ops.build_plan(active, 4)
    x = (_dense(active, 4) * 100).to(dtype)
    back = ops.unpack_tiles(ops.pack_tiles(x, plan), plan, 1)
    seen = active.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(x)
    assert back.dtype == dtype
    assert torch.equal(back, torch.where(seen, x, torch.ones((), dtype=dtype)))


def test_any_strides_give_the_same_tiles() -> None:
    active = MASKS["mixed"]
    plan = ops.build_plan(active, 4)
    x = _dense(active, 4, 6)
    expected = ops.pack_tiles(x, plan)
    wide = torch.full((*x.shape[:3], 2 * x.shape[3]), torch.nan, dtype=x.dtype)
    wide[..., ::2] = x
    flipped = x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    for other in (x.contiguous(memory_format=torch.channels_last), wide[..., ::2], flipped, x[:, :1].expand(-1, 6, -1, -1)):
        reference_tiles = expected if other.data_ptr() != x.data_ptr() else expected[:, :1].expand(-1, 6, -1, -1)
        assert torch.equal(ops.pack_tiles(other, plan), reference_tiles)
    for tiles in (expected.contiguous(), expected.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)):
        assert torch.equal(ops.unpack_tiles(tiles, plan), reference.unpack_tiles(expected, active))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", MASKS)
def test_each_is_the_adjoint_of_the_other(name: str, backend: str) -> None:
    active = MASKS[name]
    plan = ops.build_plan(active, 2)
    x = _dense(active, 2).requires_grad_()
    tiles = ops.pack_tiles(x, plan, backend=backend)
    weights = torch.randn_like(tiles)
    (grad,) = torch.autograd.grad(tiles, x, weights)
    assert torch.equal(grad, ops.unpack_tiles(weights, plan))
    tiles = tiles.detach().requires_grad_()
    weights = torch.randn_like(x)
    (grad,) = torch.autograd.grad(ops.unpack_tiles(tiles, plan, backend=backend), tiles, weights)
    assert torch.equal(grad, ops.pack_tiles(weights, plan))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend: str) -> None:
    active = MASKS["mixed"][:2, :2, :3]
    plan = ops.build_plan(active, 2)
    x = _dense(active, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.pack_tiles(x, plan, backend=backend), x)
    assert torch.autograd.gradgradcheck(lambda x: ops.pack_tiles(x, plan, backend=backend), x)
    tiles = torch.randn(plan.num_tiles, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ops.unpack_tiles(t, plan, 3.0, backend=backend), tiles)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck itself asks for it
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype: torch.dtype, backend: str) -> None:
    plan = ops.build_plan(MASKS["mixed"], 2)
    x = _dense(MASKS["mixed"], 2, dtype=dtype).requires_grad_()
    tensors = plan.tensors()[:3]
    torch.library.opcheck(torch.ops.mwm.pack_tiles.default, (x, *tensors, backend))
    tiles = torch.randn(plan.num_tiles, 3, 2, 2).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.mwm.unpack_tiles.default, (tiles, *tensors, 0.5, backend))


def test_hidden_nan_never_reaches_a_tile_and_hidden_pixels_get_exactly_zero_gradient() -> None:
    active = MASKS["mixed"]
    plan = ops.build_plan(active, 4)
    x = _dense(active, 4)
    hidden = ~active.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(x)
    x[hidden] = torch.nan
    x.requires_grad_()
    tiles = ops.pack_tiles(x, plan)
    assert not tiles.isnan().any()
    (tiles * torch.randn_like(tiles)).sum().backward()
    assert (x.grad[hidden] == 0).all()
    assert not ops.unpack_tiles(tiles, plan).isnan().any()


@pytest.mark.parametrize(("dtype", "channels", "edge"), [(torch.float32, 64, 16), (torch.bfloat16, 96, 16), (torch.float32, 3, 64), (torch.float32, 20, 31)], ids=str)
@pytest.mark.parametrize("fill", [0.0, -2.5])
def test_large_maps_are_written_whole(dtype: torch.dtype, channels: int, edge: int, fill: float, isa: str) -> None:
    """Beyond some megabytes rows are stored past the caches where whole lines allow it (not for 20 channels on an edge of 31)."""
    active = torch.rand(5, 7, 7) < 0.5
    plan = ops.build_plan(active, edge)
    tiles = torch.randn(plan.num_tiles, channels, edge, edge).to(dtype).to(memory_format=torch.channels_last)
    for given in (tiles, tiles.contiguous()):
        assert torch.equal(ops.unpack_tiles(given, plan, fill, backend="cpu"), reference.unpack_tiles(tiles, active, fill))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    active = MASKS["square 7"].repeat(4, 1, 1)
    plan = ops.build_plan(active, 8)
    x = _dense(active, 8, 16)
    results = []
    for count in (1, 2, 3):
        with harness.num_threads(count):
            tiles = ops.pack_tiles(x, plan)
            results.append((tiles, ops.unpack_tiles(tiles, plan)))
    assert all(torch.equal(tiles, results[0][0]) and torch.equal(dense, results[0][1]) for tiles, dense in results)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((4, 3, 12), r"x must be \[B, C, H, W\]"), ((3, 1, 12, 20), "B = 4"), ((4, 1, 13, 20), "square tiles"), ((4, 1, 12, 15), "square tiles")],
)
def test_pack_refuses_what_does_not_fit(shape: tuple[int, ...], message: str) -> None:
    plan = ops.build_plan(MASKS["mixed"], 4)
    with pytest.raises(ValueError, match=message):
        ops.pack_tiles(torch.zeros(shape), plan)


def test_unpack_refuses_tiles_of_another_plan() -> None:
    plan = ops.build_plan(MASKS["mixed"], 4)
    with pytest.raises(ValueError, match=f"T = {plan.num_tiles}"):
        ops.unpack_tiles(torch.zeros(plan.num_tiles + 1, 1, 4, 4), plan)
    with pytest.raises(ValueError, match=r"\[T, C, t, t\]"):
        ops.unpack_tiles(torch.zeros(plan.num_tiles, 1, 4, 3), plan)


def test_native_code_refuses_a_forged_plan() -> None:
    plan = ops.build_plan(MASKS["mixed"], 4)
    x = torch.zeros(4, 1, 12, 20)
    coords = plan.coords.clone()
    coords[0, 0] = 99
    with pytest.raises(ValueError, match="coords"):
        torch.ops.mwm.pack_tiles(x, plan.active, coords, plan.slots, "cpu")
    slots = plan.slots.clone()
    slots[0, 0, 0] = 10_000
    with pytest.raises(ValueError, match="slots"):
        torch.ops.mwm.unpack_tiles(torch.zeros(plan.num_tiles, 1, 4, 4), plan.active, plan.coords, slots, 0.0, "cpu")


def test_autocast_leaves_the_dtype_alone() -> None:
    plan = ops.build_plan(MASKS["mixed"], 4)
    with torch.autocast("cpu", torch.bfloat16):
        tiles = ops.pack_tiles(torch.zeros(4, 1, 12, 20), plan)
        assert tiles.dtype == ops.unpack_tiles(tiles, plan).dtype == torch.float32


def _filled(tiles: Tensor, plan: ops.TilePlan, token: Tensor) -> Tensor:
    """What `fill` as a tensor means, in torch's own operations."""
    edge = tiles.shape[-1]
    visible = plan.active.repeat_interleave(edge, 1).repeat_interleave(edge, 2)[:, None]
    return torch.where(visible, reference.unpack_tiles(tiles, plan.active, 0.0), token[:, None, None])


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("edge", "channels"), [(1, 1), (3, 5), (4, 64)])
def test_a_token_fills_what_is_hidden_and_learns_from_there_alone(name: str, dtype: torch.dtype, edge: int, channels: int, isa: str) -> None:
    plan = ops.build_plan(MASKS[name], edge)
    tiles = torch.randn(plan.num_tiles, channels, edge, edge).to(dtype).requires_grad_()
    token = torch.randn(channels).to(dtype).requires_grad_()
    mine, want = ops.unpack_tiles(tiles, plan, token), _filled(tiles, plan, token)
    assert mine.dtype == dtype and mine.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(mine, want)
    grad = torch.randn(want.shape).to(dtype)
    found = torch.autograd.grad(mine, [tiles, token], grad)
    hidden = ~MASKS[name].repeat_interleave(edge, 1).repeat_interleave(edge, 2)[:, None]
    exact = (grad.double() * hidden).sum((0, 2, 3))
    assert torch.equal(found[0], torch.autograd.grad(want, tiles, grad, retain_graph=True)[0])
    torch.testing.assert_close(found[1].double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-4 if dtype != torch.float64 else 1e-12)


def test_a_token_fills_maps_that_are_written_past_the_caches() -> None:
    plan = ops.build_plan(torch.rand(4, 7, 7, generator=torch.Generator().manual_seed(0)) < 0.4, 8)
    tiles, token = torch.randn(plan.num_tiles, 192, 8, 8), torch.randn(192)
    assert torch.equal(ops.unpack_tiles(tiles, plan, token), _filled(tiles, plan, token))


def test_the_tokens_gradient_has_the_same_bits_whatever_the_threads() -> None:
    plan = ops.build_plan(MASKS["mixed"], 16)
    token, grad = torch.randn(32, requires_grad=True), torch.randn(4, 32, 48, 80)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(torch.autograd.grad(ops.unpack_tiles(torch.zeros(plan.num_tiles, 32, 16, 16), plan, token), token, grad)[0])
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of opcheck itself
def test_a_token_agrees_with_the_reference_backend_and_passes_gradcheck_and_opcheck() -> None:
    plan = ops.build_plan(MASKS["mixed"], 2)
    tiles, token = torch.randn(plan.num_tiles, 3, 2, 2, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(ops.unpack_tiles(tiles, plan, token), ops.unpack_tiles(tiles, plan, token, backend="reference"))
    assert torch.autograd.gradcheck(lambda t, f: ops.unpack_tiles(t, plan, f), (tiles, token))
    torch.library.opcheck(torch.ops.mwm.unpack_tiles_token.default, (tiles, token, *plan.tensors()[:3]))


@pytest.mark.parametrize(
    ("fill", "error", "words"),
    [
        (torch.zeros(4), ValueError, r"fill must be a number or \[C\] with C = 3"),
        (torch.zeros(1, 3), ValueError, r"fill must be a number or \[C\]"),
        (torch.zeros(3, dtype=torch.int64), TypeError, "fill may be a tensor where both are floating"),
        (torch.zeros(3, device="meta"), ValueError, "fill must lie on the device of tiles"),
    ],
)
def test_a_token_that_does_not_fit_is_refused(fill: Tensor, error: type[Exception], words: str) -> None:
    plan = ops.build_plan(MASKS["mixed"], 2)
    with pytest.raises(error, match=words):
        ops.unpack_tiles(torch.zeros(plan.num_tiles, 3, 2, 2), plan, fill)
