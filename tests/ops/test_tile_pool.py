from __future__ import annotations

import random

import harness
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mwm import ops
from mwm.ops import reference

MASKS = harness.masks()
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _oracle(plan: ops.TilePlan, **settings: object):
    """torch's own pooling of the unpacked map; 4-tuple padding becomes F.pad."""
    s = {"mode": "max", "padding": 0, "dilation": 1, "ceil_mode": False, "count_include_pad": True, "divisor_override": None, **settings}
    padding = s["padding"]

    def function(tiles: Tensor) -> Tensor:
        x = reference.unpack_tiles(tiles, plan.active)
        inner = padding
        if isinstance(padding, tuple) and len(padding) == 4:
            fill = (float("-inf") if s.get("pad_value") is None else s["pad_value"]) if s["mode"] == "max" else 0.0
            x, inner = F.pad(x, padding, value=fill), 0
        stride = s.get("stride") or s["kernel_size"]
        if s["mode"] == "max":
            out = F.max_pool2d(x, s["kernel_size"], stride, inner, s["dilation"], ceil_mode=s["ceil_mode"])
        else:
            out = F.avg_pool2d(x, s["kernel_size"], stride, inner, s["ceil_mode"], s["count_include_pad"], s["divisor_override"])
        return reference.pack_tiles(out, plan.active)

    return function


CASES = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": (0, 1, 0, 1)},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": (5, 3), "stride": 1, "padding": (2, 1)},
    {"kernel_size": 13, "stride": 1, "padding": 6},  # over several tiles
    {"kernel_size": 4, "stride": 4},
    {"kernel_size": 1, "stride": 2},
]
MAX_CASES = [
    *CASES,
    {"kernel_size": 5, "stride": 1, "padding": (4, 4), "dilation": 2, "_skip_half_rule": True},
    {"kernel_size": 3, "stride": 2, "padding": (0, 1, 0, 1), "pad_value": 0.0},
    {"kernel_size": 3, "stride": 1, "padding": (1, 1, 2, 0), "pad_value": -0.25},
]
AVG_CASES = [
    *CASES,
    {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True, "count_include_pad": False},
    {"kernel_size": 2, "stride": 2, "ceil_mode": True},
    {"kernel_size": 3, "stride": 1, "padding": 1, "divisor_override": 5},
]


def _run(plan: ops.TilePlan, backend: str | None = None, **settings: object):
    settings = {k: v for k, v in settings.items() if not k.startswith("_")}
    return lambda tiles: ops.tile_pool(tiles, plan, backend=backend, **settings)


def _cases() -> list:
    return [("max", case) for case in MAX_CASES if not case.get("_skip_half_rule")] + [("avg", case) for case in AVG_CASES]


@pytest.mark.parametrize(("mode", "case"), _cases(), ids=str)
@pytest.mark.parametrize("name", ["mixed", "single tile", "checkerboard", "all visible", "all hidden", "no image"])
def test_pooling_equals_torch_on_the_unpacked_map(name: str, mode: str, case: dict, isa: str) -> None:
    plan = ops.build_plan(MASKS[name], 4)
    tiles = harness.normals((plan.num_tiles, 3, 4, 4), torch.Generator().manual_seed(5))
    harness.check(_run(plan, mode=mode, **case), _oracle(plan, mode=mode, **case), [tiles], dtype=torch.float32)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize("channels", [1, 7, 300])
def test_every_dtype_and_channel_count(channels: int, mode: str, dtype: torch.dtype, isa: str) -> None:
    plan = ops.build_plan(MASKS["mixed"], 4)
    tiles = harness.normals((plan.num_tiles, channels, 4, 4), torch.Generator().manual_seed(5))
    case = {"kernel_size": 3, "stride": 2, "padding": 1}
    harness.check(_run(plan, mode=mode, **case), _oracle(plan, mode=mode, **case), [tiles], dtype=dtype)


@pytest.mark.parametrize("mode", ["max", "avg"])
def test_random_geometry_equals_torch_in_exact_integers(mode: str) -> None:
    random.seed(11)
    tried = 0
    while tried < 60:
        edge, stride = random.choice([(1, 1), (3, 1), (3, 3), (4, 2), (7, 1), (6, 2), (6, 3)])
        kernel = (random.randint(1, 9), random.randint(1, 9))
        padding = (random.randint(0, kernel[0] // 2), random.randint(0, kernel[1] // 2))
        settings = {"mode": mode, "kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": random.random() < 0.5}
        if mode == "avg":  # a divisor of one keeps the sums exact
            settings |= {"divisor_override": 1}
        plan = ops.build_plan(MASKS[random.choice(["mixed", "checkerboard", "one patch", "square 7"])], edge)
        tiles = harness.integers((plan.num_tiles, 3, edge, edge), torch.Generator().manual_seed(tried))
        try:
            run = _run(plan, **settings)
            run(tiles)
        except ValueError:
            continue
        tried += 1
        harness.check(run, _oracle(plan, **settings), [tiles], exact=True, threads=(1,))


@pytest.mark.parametrize("case", MAX_CASES, ids=str)
def test_max_with_ties_gives_the_gradient_to_the_first_in_window_order(case: dict) -> None:
    """Values from {-1, 0, 1}: nearly every window has ties, also with hidden zeros."""
    plan = ops.build_plan(MASKS["mixed"], 4)
    tiles = torch.randint(-1, 2, (plan.num_tiles, 3, 4, 4)).float()
    results = []
    for backend in ("cpu", "reference"):
        leaf = tiles.clone().requires_grad_()
        out = _run(plan, backend, **case)(leaf)
        (grad,) = torch.autograd.grad(out, leaf, torch.arange(out.numel()).reshape(out.shape).float())
        results.append((out.detach(), grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    if not case.get("_skip_half_rule"):
        leaf = tiles.clone().requires_grad_()
        out = _oracle(plan, **case)(leaf)
        (grad,) = torch.autograd.grad(out, leaf, torch.arange(out.numel()).reshape(out.shape).float())
        assert torch.equal(results[0][1], grad)


def test_a_hidden_neighbour_is_zero_and_the_image_border_minus_infinity() -> None:
    active = torch.tensor([[[True, False]]])
    plan = ops.build_plan(active, 2)
    tiles = torch.tensor([[[[-1.0, -2.0], [-3.0, -4.0]]]], requires_grad=True)
    out = ops.tile_pool(tiles, plan, kernel_size=3, stride=1, padding=1)
    assert out.tolist() == [[[[-1.0, 0.0], [-1.0, 0.0]]]]
    out.sum().backward()
    assert tiles.grad.tolist() == [[[[2.0, 0.0], [0.0, 0.0]]]]  # nothing where the hidden zero wins


def test_nan_inside_a_window_wins_as_in_torch() -> None:
    plan = ops.build_plan(torch.ones((1, 2, 2), dtype=torch.bool), 4)
    tiles = torch.randn(4, 2, 4, 4)
    tiles[1, 0, 2, 0] = torch.nan
    settings = {"kernel_size": 3, "stride": 2, "padding": 1}
    found, expected = _run(plan, **settings)(tiles), _oracle(plan, **settings)(tiles)
    assert torch.equal(found.isnan(), expected.isnan())
    assert found.isnan().any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mode", ["max", "avg"])
def test_gradcheck(mode: str, backend: str) -> None:
    plan = ops.build_plan(MASKS["mixed"][:2], 4)
    tiles = torch.randn(plan.num_tiles, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    settings = {"mode": mode, "kernel_size": 3, "stride": 2, "padding": 1}
    assert torch.autograd.gradcheck(_run(plan, backend, **settings), tiles)


def test_a_second_derivative_is_refused() -> None:
    plan = ops.build_plan(MASKS["mixed"], 4)
    tiles = torch.randn(plan.num_tiles, 2, 4, 4, requires_grad=True)
    out = ops.tile_pool(tiles, plan, kernel_size=2).square().sum()
    (grad,) = torch.autograd.grad(out, tiles, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck itself asks for it
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mode", ["max", "avg"])
def test_opcheck(mode: str, backend: str) -> None:
    plan = ops.build_plan(MASKS["mixed"], 4)
    tiles = torch.randn(plan.num_tiles, 2, 4, 4, requires_grad=True)
    numbers = [int(mode == "max"), 3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 0, 1, 0]
    torch.library.opcheck(torch.ops.mwm.tile_pool.default, (tiles, *plan.tensors()[:3], numbers, None, backend))
    out, taps = torch.ops.mwm.tile_pool(tiles.detach(), *plan.tensors()[:3], numbers, None, backend)
    torch.library.opcheck(torch.ops.mwm.tile_pool_backward.default, (out, taps, *plan.tensors()[:3], numbers, 4, backend))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_size": 3, "stride": 2}, "12 x 20 map becomes 5 x 9, not 6 x 10"),
        ({"kernel_size": 3, "stride": 3, "padding": 1}, "tiles of edge 4"),
        ({"kernel_size": 3, "stride": (1, 2), "padding": 1}, "stride"),
        ({"kernel_size": 0}, "kernel_size"),
        ({"kernel_size": 2, "mode": "min"}, "mode"),
        ({"kernel_size": 3, "stride": 1, "padding": 1, "mode": "avg", "dilation": 2}, "dilation"),
        ({"kernel_size": 2, "mode": "avg", "divisor_override": 0}, "divisor_override"),
        ({"kernel_size": 3, "stride": 1, "padding": -1}, "padding"),
    ],
)
def test_wrong_geometry_is_refused_with_the_numbers(settings: dict, message: str) -> None:
    plan = ops.build_plan(MASKS["mixed"], 4)
    with pytest.raises(ValueError, match=message):
        ops.tile_pool(torch.zeros(plan.num_tiles, 1, 4, 4), plan, **settings)
