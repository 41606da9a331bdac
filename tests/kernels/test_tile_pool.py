"""Pooling of packed tiles in Triton, against torch's own pooling of the unpacked map."""

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
CASES = [
    ("max", {"kernel_size": 3, "stride": 2, "padding": 1}),
    ("max", {"kernel_size": 2}),
    ("max", {"kernel_size": 3, "stride": 2, "padding": (0, 1, 0, 1)}),
    ("max", {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    ("max", {"kernel_size": 3, "stride": 1, "padding": (1, 1, 2, 0), "pad_value": -0.25}),
    ("max", {"kernel_size": (5, 3), "stride": 1, "padding": (2, 1)}),
    ("max", {"kernel_size": 3, "stride": 1, "padding": 2, "dilation": 2, "torch_refuses": True}),
    ("avg", {"kernel_size": 3, "stride": 2, "padding": 1}),
    ("avg", {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False}),
    ("avg", {"kernel_size": 3, "stride": 2, "ceil_mode": True, "count_include_pad": False}),
    ("avg", {"kernel_size": 5, "stride": 1, "padding": 2}),
    ("avg", {"kernel_size": 3, "stride": 1, "padding": 1, "divisor_override": 5}),
    ("avg", {"kernel_size": 4, "stride": 4}),
]


def _oracle(plan: ops.TilePlan, mode: str, **settings: object):
    s = {"padding": 0, "dilation": 1, "ceil_mode": False, "count_include_pad": True, "divisor_override": None, **settings}

    def function(tiles: Tensor) -> Tensor:
        x, inner = reference.unpack_tiles(tiles, plan.active), s["padding"]
        if (isinstance(inner, tuple) and len(inner) == 4) or "torch_refuses" in s:  # torch pads by at most half a window
            sides = inner if isinstance(inner, tuple) else (inner,) * 4
            fill = s.get("pad_value", float("-inf")) if mode == "max" else 0.0
            x, inner = F.pad(x, sides, value=fill), 0
        stride = s.get("stride") or s["kernel_size"]
        if mode == "max":
            out = F.max_pool2d(x, s["kernel_size"], stride, inner, s["dilation"], ceil_mode=s["ceil_mode"])
        else:
            out = F.avg_pool2d(x, s["kernel_size"], stride, inner, s["ceil_mode"], s["count_include_pad"], s["divisor_override"])
        return reference.pack_tiles(out, plan.active)

    return function


def _run(plan: ops.TilePlan, device: str, mode: str, **settings: object):
    there = plan.to(device)
    settings.pop("torch_refuses", None)
    return lambda tiles: ops.tile_pool(tiles.to(device), there, mode=mode, backend="triton", **settings).cpu()


@pytest.mark.parametrize(("mode", "case"), CASES, ids=str)
def test_pooling_equals_torch_on_the_unpacked_map(mode: str, case: dict, device: str) -> None:
    plan = ops.build_plan(MASKS["mixed"], 4)
    tiles = harness.normals((plan.num_tiles, 3, 4, 4), torch.Generator().manual_seed(5))
    harness.check(_run(plan, device, mode, **case), _oracle(plan, mode, **case), [tiles], threads=(1,))


@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_in_exact_integers(name: str, mode: str, device: str) -> None:
    plan = ops.build_plan(MASKS[name], 2)
    tiles = harness.integers((plan.num_tiles, 3, 2, 2), torch.Generator().manual_seed(5))
    case = {"kernel_size": 3, "stride": 2, "padding": 1, **({"divisor_override": 1} if mode == "avg" else {})}
    harness.check(_run(plan, device, mode, **case), _oracle(plan, mode, **case), [tiles], exact=True, threads=(1,))


@pytest.mark.parametrize(("dtype", "channels"), [(torch.float16, 7), (torch.float16, 70), (torch.float32, 1)])
@pytest.mark.parametrize("mode", ["max", "avg"])
def test_every_dtype_and_channel_count(channels: int, mode: str, dtype: torch.dtype, device: str) -> None:
    plan = ops.build_plan(MASKS["mixed"][:1, :2], 4)
    tiles = harness.normals((plan.num_tiles, channels, 4, 4), torch.Generator().manual_seed(5))
    case = {"kernel_size": 3, "stride": 2, "padding": 1}
    harness.check(_run(plan, device, mode, **case), _oracle(plan, mode, **case), [tiles], dtype=dtype, threads=(1,))


def test_bfloat16_maxima_are_values_of_the_input(device: str) -> None:
    plan = ops.build_plan(MASKS["checkerboard"], 4)
    tiles = torch.randn(plan.num_tiles, 5, 4, 4).bfloat16()
    case = {"kernel_size": 3, "stride": 2, "padding": 1}
    assert torch.equal(_run(plan, device, "max", **case)(tiles), _oracle(plan, "max", **case)(tiles.float()).bfloat16())


@pytest.mark.parametrize("mode", ["max", "avg"])
def test_random_geometry_equals_torch_in_exact_integers(mode: str, device: str) -> None:
    random.seed(11)
    tried = 0
    while tried < 8:
        edge, stride = random.choice([(1, 1), (3, 1), (3, 3), (4, 2), (6, 3)])
        kernel = (random.randint(1, 5), random.randint(1, 5))
        padding = (random.randint(0, kernel[0] // 2), random.randint(0, kernel[1] // 2))
        settings = {"kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": random.random() < 0.5}
        if mode == "avg":
            settings |= {"divisor_override": 1}
        plan = ops.build_plan(MASKS[random.choice(["mixed", "one patch"])], edge)
        tiles = harness.integers((plan.num_tiles, 3, edge, edge), torch.Generator().manual_seed(tried))
        try:
            ops.tile_pool(tiles, plan, mode=mode, **settings)
        except ValueError:
            continue
        tried += 1
        harness.check(_run(plan, device, mode, **settings), _oracle(plan, mode, **settings), [tiles], exact=True, threads=(1,))


@pytest.mark.parametrize("case", [case for mode, case in CASES if mode == "max"], ids=str)
def test_ties_and_nan_go_where_the_cpu_kernel_and_torch_send_them(case: dict, device: str) -> None:
    """Values from {-1, 0, 1}: nearly every window has ties, also with hidden zeros."""
    settings = {k: v for k, v in case.items() if k != "torch_refuses"}
    plan = ops.build_plan(MASKS["mixed"], 4)
    tiles = torch.randint(-1, 2, (plan.num_tiles, 3, 4, 4)).float()
    tiles[1, 0, 1, 1] = torch.nan
    found = []
    for backend, where in (("triton", device), ("reference", "cpu")):
        leaf = tiles.to(where).requires_grad_()
        out = ops.tile_pool(leaf, plan.to(where), mode="max", backend=backend, **settings)
        grad = torch.autograd.grad(out, leaf, torch.arange(out.numel(), device=where).reshape(out.shape).float())[0]
        found.append((out.detach().cpu(), grad.cpu()))
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine.nan_to_num(99.0), other.nan_to_num(99.0))


@pytest.mark.parametrize("include", [True, False])
def test_the_gradient_of_a_mean_is_the_cpu_kernels_bit_for_bit(include: bool, device: str) -> None:
    """Sums of ninths and sixths: their last bit shows in which order the windows are added."""
    settings = {"mode": "avg", "kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": include}
    plan = ops.build_plan(MASKS["mixed"], 4)
    tiles = torch.randn(plan.num_tiles, 3, 4, 4)
    found = []
    for backend, where in (("triton", device), ("cpu", "cpu")):
        leaf = tiles.to(where).requires_grad_()
        out = ops.tile_pool(leaf, plan.to(where), backend=backend, **settings)
        grad = torch.randint(-9, 10, out.shape, generator=torch.Generator().manual_seed(4)).float()
        found.append(torch.autograd.grad(out, leaf, grad.to(where))[0].cpu())
    assert torch.equal(*found)
