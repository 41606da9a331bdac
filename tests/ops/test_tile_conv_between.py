"""tile_conv_between against torch on the dense map: what lies in one plan's tiles, computed at those of another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mwm.ops import TilePlan, build_plan, pack_tiles, tile_conv_between, unpack_tiles

CASES = {
    "3x3": dict(kernel=3, stride=1, padding=1, transposed=False),
    "1x1": dict(kernel=1, stride=1, padding=0, transposed=False),
    "3x3 strided": dict(kernel=3, stride=2, padding=1, transposed=False),
    "4x4 transposed": dict(kernel=4, stride=2, padding=1, transposed=True),
    "2x2 transposed": dict(kernel=2, stride=2, padding=0, transposed=True),
    "3x3 transposed": dict(kernel=3, stride=1, padding=1, transposed=True),
}


def _plans(batch: int = 3, grid: tuple[int, int] = (3, 4)) -> tuple[Tensor, Tensor]:
    active = torch.rand(batch, *grid) < 0.4
    active[0, 0, 0], active[0, 0, 1], active[-1] = True, False, False
    return active, ~active


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, case: dict) -> Tensor:
    if case["transposed"]:
        return F.conv_transpose2d(x, weight, bias, case["stride"], case["padding"])
    return F.conv2d(x, weight, bias, case["stride"], case["padding"])


def _case(case: dict, edge: int, channels: int, filters: int, source: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    plan = build_plan(source, 16)
    x = torch.randn(plan.num_tiles, channels, edge, edge, dtype=dtype)
    shape = (channels, filters) if case["transposed"] else (filters, channels)
    return x, torch.randn(*shape, case["kernel"], case["kernel"], dtype=dtype), torch.randn(filters, dtype=dtype)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, source: TilePlan, target: TilePlan, case: dict, **more) -> Tensor:
    return tile_conv_between(x, weight, bias, source, target, stride=case["stride"], padding=case["padding"], transposed=case["transposed"], **more)


@pytest.mark.parametrize("edge", [2, 4])
@pytest.mark.parametrize(("channels", "filters"), [(2, 3), (17, 70), (1, 5)])
@pytest.mark.parametrize("name", CASES)
def test_result_and_gradients_equal_the_dense_map_cut_out(name: str, channels: int, filters: int, edge: int) -> None:
    case, (source, target) = CASES[name], _plans()
    tensors = _case(case, edge, channels, filters, source)
    s, t = build_plan(source, 16), build_plan(target, 16)
    ours = [tensor.clone().requires_grad_() for tensor in tensors]
    theirs = [tensor.clone().requires_grad_() for tensor in tensors]
    out = _run(*ours, s, t, case)
    expected = pack_tiles(_dense(unpack_tiles(theirs[0], s), *theirs[1:], case), t)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    weights = torch.randn_like(out)
    found, wanted = torch.autograd.grad((out * weights).sum(), ours), torch.autograd.grad((expected * weights).sum(), theirs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["3x3", "4x4 transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_stays_as_near_to_float64_as_torch(name: str, dtype: torch.dtype) -> None:
    case, (source, target) = CASES[name], _plans()
    s, t = build_plan(source, 16), build_plan(target, 16)
    tensors = _case(case, 4, 24, 40, source, dtype)
    exact = pack_tiles(_dense(unpack_tiles(tensors[0].double(), s), tensors[1].double(), tensors[2].double(), case), t)
    plain = pack_tiles(_dense(unpack_tiles(tensors[0], s), *tensors[1:], case), t)
    out = _run(*tensors, s, t, case)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    assert (out.double() - exact).norm() <= 2 * (plain.double() - exact).norm() + 1e-7 * exact.norm()


def test_one_plan_on_both_sides_is_the_convolution_of_packed_tiles() -> None:
    from mwm.ops import tile_conv

    case, (source, _) = CASES["3x3"], _plans()
    plan = build_plan(source, 16)
    tensors = _case(case, 4, 12, 20, source, torch.float32)
    assert torch.equal(_run(*tensors, plan, plan, case), tile_conv(*tensors, plan, padding=1))


@pytest.mark.parametrize("name", ["3x3", "4x4 transposed"])
@pytest.mark.parametrize("share", ["no source", "no target", "no image"])
def test_empty_sides_give_the_bias_or_nothing(name: str, share: str) -> None:
    case = CASES[name]
    source = torch.zeros(0 if share == "no image" else 2, 3, 4, dtype=torch.bool)
    target = torch.ones_like(source)
    if share == "no target":
        source, target = target, source
    tensors = [tensor.requires_grad_() for tensor in _case(case, 2, 4, 6, source)]
    out = _run(*tensors, build_plan(source, 16), build_plan(target, 16), case)
    assert torch.equal(out, tensors[2][:, None, None].expand_as(out))
    out.sum().backward()
    assert tensors[0].grad.abs().sum() == 0 and tensors[1].grad.abs().sum() == 0
    assert torch.equal(tensors[2].grad, torch.full((6,), float(out[:, 0].numel()), dtype=torch.float64))


@pytest.mark.parametrize("name", ["3x3", "4x4 transposed"])
def test_bits_do_not_depend_on_threads_or_on_the_run(name: str) -> None:
    case, (source, target) = CASES[name], _plans(6, (5, 5))
    s, t = build_plan(source, 16), build_plan(target, 16)
    tensors = _case(case, 4, 48, 64, source, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            given = [tensor.clone().requires_grad_() for tensor in tensors]
            out = _run(*given, s, t, case)
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), given)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_tiles_that_no_window_reaches_are_not_read() -> None:
    source, target = torch.zeros(1, 1, 4, dtype=torch.bool), torch.zeros(1, 1, 4, dtype=torch.bool)
    source[0, 0, 0] = source[0, 0, 3] = target[0, 0, 1] = True
    s, t = build_plan(source, 16), build_plan(target, 16)
    for name in ("3x3", "4x4 transposed"):
        x, weight, bias = _case(CASES[name], 4, 6, 7, source)
        clean = _run(x, weight, bias, s, t, CASES[name])
        x[1] = float("nan")
        assert torch.equal(_run(x, weight, bias, s, t, CASES[name]), clean)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of opcheck itself
def test_registered_ops_pass_opcheck_and_gradcheck() -> None:
    case, (source, target) = CASES["4x4 transposed"], _plans(2, (2, 2))
    s, t = build_plan(source, 16), build_plan(target, 16)
    tensors = [tensor.requires_grad_() for tensor in _case(case, 2, 3, 4, source)]
    assert torch.autograd.gradcheck(lambda *given: _run(*given, s, t, case), tensors)
    arguments = (*tensors, s.coords, s.slots, t.coords, t.slots, [2, 1, 1, 1, 1, 1, 1, 1], 4, True)
    torch.library.opcheck(torch.ops.mwm.tile_conv_between.default, arguments)


def test_autocast_takes_all_three_to_its_dtype() -> None:
    case, (source, target) = CASES["3x3"], _plans()
    s, t = build_plan(source, 16), build_plan(target, 16)
    tensors = _case(case, 2, 8, 8, source, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert _run(*tensors, s, t, case).dtype == torch.bfloat16


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"weight": torch.zeros(3, 5, 3, 3, dtype=torch.float64)}, ValueError, r"weight must be \[K, C, kh, kw\] with C = 2"),
    ({"bias": torch.zeros(4, dtype=torch.float64)}, ValueError, r"bias must be \[K\] with K = 3"),
    ({"bias": torch.zeros(3)}, TypeError, "bias must have the dtype of x"),
    ({"target": build_plan(torch.ones(3, 4, 4, dtype=torch.bool), 16)}, ValueError, "target must be a plan of the source's images and grid"),
    ({"padding": 0}, ValueError, "the output must be the input divided by the stride"),
])
def test_what_does_not_fit_is_refused(change: dict, error: type, words: str) -> None:
    source, target = _plans()
    x, weight, bias = _case(CASES["3x3"], 2, 2, 3, source)
    given = {"x": x, "weight": weight, "bias": bias, "source": build_plan(source, 16), "target": build_plan(target, 16), "padding": 1}
    with pytest.raises(error, match=words):
        tile_conv_between(**{**given, **change})
