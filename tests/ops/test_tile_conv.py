"""`tile_conv` against dense conv2d on the unpacked map: value, three gradients, every instruction set."""

from __future__ import annotations

import random
from collections.abc import Iterator

import harness
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conv_cases import CONVS, DEPTHWISE, MASKS, Conv
from torch import Tensor

from mwm import ops
from mwm.ops.conv_geometry import conv_numbers
from mwm.ops.pointwise_conv import pointwise_conv


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small work: the harness sets the numbers of threads where they matter."""
    with harness.num_threads(1):
        yield


@pytest.mark.parametrize("case", CONVS)
def test_small_integers_are_exact_on_every_instruction_set(case: str, isa: str) -> None:
    conv = CONVS[case]
    plan = ops.build_plan(MASKS["mixed"], conv.edge)
    harness.check(conv.run(plan, "cpu"), conv.oracle(plan), conv.inputs(plan, exact=True), exact=True)


@pytest.mark.parametrize("name", [name for name in MASKS if name != "mixed"])
@pytest.mark.parametrize("case", ["3x3", "3x3 t1", "3x3 stride 2", "stem 7x7", "7x7 t1", "groups of 4", "1x1 stride 2"])
def test_every_mask_is_exact(case: str, name: str) -> None:
    conv = CONVS[case]
    plan = ops.build_plan(MASKS[name], conv.edge)
    harness.check(conv.run(plan, "cpu"), conv.oracle(plan), conv.inputs(plan, exact=True), exact=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["3x3", "3x3 t1", "stem 7x7", "3x3 stride 2", "groups of 4", "1x1 stride 2", "5x5 t1"])
def test_error_stays_within_the_budget_of_dense_torch(case: str, dtype: torch.dtype, isa: str) -> None:
    conv = CONVS[case]
    plan = ops.build_plan(MASKS["square 7"], conv.edge)
    harness.check(conv.run(plan, "cpu"), conv.oracle(plan), conv.inputs(plan), dtype=dtype, threads=(1,))


@pytest.mark.parametrize("case", CONVS)
def test_the_reference_backend_means_the_same(case: str) -> None:
    conv = CONVS[case]
    plan = ops.build_plan(MASKS["mixed"], conv.edge)
    harness.check(conv.run(plan, "reference"), conv.oracle(plan), conv.inputs(plan, exact=True), exact=True, threads=(1,))


def test_random_geometry_is_exact() -> None:
    rng = random.Random(5)
    tried = 0
    while tried < 120:
        edge, stride = rng.choice([(1, 1), (2, 1), (3, 1), (3, 3), (4, 2), (7, 1), (6, 2), (6, 3), (8, 4)])
        kernel = (rng.randint(1, 9), rng.randint(1, 9))
        dilation = (rng.randint(1, 3), rng.randint(1, 3))
        groups = rng.choice([1, 1, 2, 4])
        padding = tuple(rng.randint(0, 9) for _ in range(4))
        plan = ops.build_plan(MASKS[rng.choice(["mixed", "checkerboard", "one patch", "square 7"])], edge)
        try:
            conv_numbers(edge, plan.grid, kernel, stride, padding, dilation, groups)
        except ValueError:
            continue
        tried += 1
        inner = rng.choice([1, 2, 5])
        conv = Conv(groups * inner, groups * rng.choice([1, 2, 3, inner]), kernel, edge, stride, padding, dilation, groups)
        harness.check(conv.run(plan, "cpu"), conv.oracle(plan), conv.inputs(plan, exact=True), exact=True, threads=(1,))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "edge", "stride"), [((3, 3), 2, 1), ((3, 3), 2, 2), ((7, 7), 1, 1), ((1, 5), 1, 1), ((5, 1), 2, 1)], ids=str
)
def test_an_impulse_meets_every_tap_at_every_border(kernel: tuple[int, int], edge: int, stride: int, groups: int) -> None:
    """One image per position; the filter has a different number at every tap, so that no two taps can be exchanged."""
    for active in (torch.ones(3, 4, dtype=torch.bool), torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 1, 1]]).bool()):
        positions = 12 * edge * edge
        plan = ops.build_plan(active.expand(positions, 3, 4).contiguous(), edge)
        images = torch.eye(positions).reshape(positions, 1, 3 * edge, 4 * edge).repeat(1, 2, 1, 1)
        weight = torch.arange(1.0, 1 + 2 * 2 // groups * kernel[0] * kernel[1]).reshape(2, 2 // groups, *kernel)
        padding = ((kernel[0] - 1) // 2, (kernel[1] - 1) // 2)
        got = ops.tile_conv(ops.pack_tiles(images, plan), weight, None, plan, stride=stride, padding=padding, groups=groups)
        seen = images * active.repeat_interleave(edge, 0).repeat_interleave(edge, 1)
        want = F.conv2d(seen, weight, None, stride, padding, 1, groups)
        assert torch.equal(got, ops.pack_tiles(want, plan))


@pytest.mark.parametrize("broken", ["one tap dropped", "one row off", "one channel exchanged"])
def test_the_budget_rejects_a_broken_kernel(broken: str) -> None:
    conv = CONVS["3x3"]
    plan = ops.build_plan(MASKS["square 7"], conv.edge)

    def wrong(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if broken == "one tap dropped":
            taps = torch.ones(3, 3, dtype=weight.dtype)
            taps[2, 0] = 0
            weight = weight * taps
        if broken == "one channel exchanged":
            x = x[:, [1, 0, *range(2, conv.channels)]]
        padding = (1, 1, 0, 2) if broken == "one row off" else 1
        return ops.tile_conv(x, weight, bias, plan, padding=padding)

    with pytest.raises(AssertionError):
        harness.check(wrong, conv.oracle(plan), conv.inputs(plan), threads=(1,))


@pytest.mark.parametrize("case", ["3x3", "3x3 stride 2", "groups of 4", "stem 7x7"])
def test_all_visible_equals_plain_conv2d(case: str) -> None:
    conv = CONVS[case]
    plan = ops.build_plan(torch.ones(2, 3, 2, dtype=torch.bool), conv.edge)
    x = torch.randn(2, conv.channels, 3 * conv.edge, 2 * conv.edge)
    weight, bias = torch.randn(conv.filters, conv.channels // conv.groups, *conv.kernel), torch.randn(conv.filters)
    got = ops.unpack_tiles(conv.run(plan)(ops.pack_tiles(x, plan), weight, bias), plan)
    want = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_the_gradient_of_a_hidden_pixel_is_exactly_zero_and_nan_there_is_never_read() -> None:
    active = MASKS["square 7"]
    plan = ops.build_plan(active, 4)
    hidden = ~active.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand(-1, 8, -1, -1)
    images = torch.randn(*hidden.shape).masked_fill(hidden, float("nan")).requires_grad_()
    for groups in (1, 8):
        out = ops.tile_conv(ops.pack_tiles(images, plan), torch.randn(8, 8 // groups, 7, 7), torch.randn(8), plan, padding=3, groups=groups)
        (grad,) = torch.autograd.grad(out.square().sum(), images)
        assert not out.isnan().any()
        assert torch.count_nonzero(grad[hidden]) == 0
        assert torch.count_nonzero(grad[~hidden]) > 0


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("case", [CONVS["3x3 t1"], CONVS["groups of 24"], DEPTHWISE["7x7 t4 96"], Conv(24, 40, (3, 3), 8, padding=1)], ids=str)
def test_results_do_not_depend_on_threads_or_repetition(case: Conv, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    plan = ops.build_plan(torch.rand((12, 7, 7), generator=generator) < 0.4, case.edge)
    inputs = [None if x is None else x.float() for x in case.inputs(plan)]

    def results() -> list[Tensor]:
        leaves = [x.requires_grad_() for x in inputs if x is not None]
        out = case.run(plan)(*inputs)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(0))]

    first = results()
    with harness.num_threads(threads):
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))


@pytest.mark.parametrize("case", ["3x3 t2", "3x3 stride 2 same", "groups of 3 to 5", "1x11 band"])
def test_gradcheck(case: str) -> None:
    conv = CONVS[case]
    plan = ops.build_plan(torch.tensor([[[1, 0, 1]], [[0, 1, 1]]]).bool(), conv.edge)
    leaves = [None if x is None else x.requires_grad_() for x in conv.inputs(plan)]
    assert torch.autograd.gradcheck(conv.run(plan), leaves)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of opcheck itself
def test_opcheck() -> None:
    plan = ops.build_plan(MASKS["mixed"], 4)
    place = plan.tensors()[:3]
    for groups in (1, 6):
        x = torch.randn(plan.num_tiles, 6, 4, 4, requires_grad=True)
        weight = torch.randn(6, 6 // groups, 3, 3, requires_grad=True)
        bias = torch.randn(6, requires_grad=True)
        geometry = [2, 1, 1, 1, 1, 1, 1, groups]
        grad = torch.randn(plan.num_tiles, 6, 2, 2)
        torch.library.opcheck(torch.ops.mwm.tile_conv, (x, weight, bias, *place, geometry, ""))
        torch.library.opcheck(torch.ops.mwm.tile_conv, (x, weight, None, *place, geometry, ""))
        torch.library.opcheck(torch.ops.mwm.tile_conv_grad_input, (grad, weight.detach(), *place, geometry, 4, ""))
        torch.library.opcheck(torch.ops.mwm.tile_conv_grad_weight, (grad, x.detach(), *place, geometry, [3, 3], ""))
        torch.library.opcheck(torch.ops.mwm.tile_conv_grad_weight, (grad.bfloat16(), x.detach().bfloat16(), *place, geometry, [3, 3], "", True))
        torch.library.opcheck(torch.ops.mwm.tile_conv_grad_bias, (grad, ""))


@pytest.mark.slow
def test_compiles_whole_with_any_number_of_tiles() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, weight: Tensor, narrow: Tensor, plan: ops.TilePlan) -> Tensor:
        y = ops.tile_conv(x, weight, None, plan, padding=1).relu()
        return ops.tile_conv(y, narrow, None, plan, padding=3, groups=8)

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    generator = torch.Generator().manual_seed(1)
    for share in (0.3, 0.5, 0.7, 0.9):
        plan = ops.build_plan(torch.rand((4, 5, 5), generator=generator) < share, 4)
        x = torch.randn(plan.num_tiles, 8, 4, 4, generator=generator).contiguous(memory_format=torch.channels_last).requires_grad_()
        torch._dynamo.mark_dynamic(plan.coords, 0)
        torch._dynamo.mark_dynamic(x, 0)
        weight, narrow = torch.randn(8, 8, 3, 3, requires_grad=True), torch.randn(8, 1, 7, 7, requires_grad=True)
        out, want = compiled(x, weight, narrow, plan), step(x, weight, narrow, plan)
        grads = [torch.autograd.grad(y, (x, weight, narrow), torch.ones_like(y)) for y in (out, want)]
        assert torch.equal(out, want)
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert counter.frame_count <= 2


def test_a_second_derivative_is_refused() -> None:
    plan = ops.build_plan(MASKS["single tile"], 2)
    x = torch.randn(1, 2, 2, 2, requires_grad=True)
    out = ops.tile_conv(x, torch.randn(2, 2, 3, 3, requires_grad=True), None, plan, padding=1)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


def test_autocast_casts_as_conv2d_does() -> None:
    plan = ops.build_plan(MASKS["mixed"], 4)
    x, weight, bias = torch.randn(plan.num_tiles, 8, 4, 4), torch.randn(8, 8, 3, 3, requires_grad=True), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.tile_conv(x, weight, bias, plan, padding=1)
        assert ops.tile_conv(x.double(), weight.double(), None, plan, padding=1).dtype == torch.float64
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, ops.tile_conv(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), plan, padding=1))
    out.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_any_strides_of_the_input_give_the_same_bits() -> None:
    plan = ops.build_plan(MASKS["mixed"], 4)
    x, weight = torch.randn(plan.num_tiles, 8, 4, 4), torch.randn(16, 8, 3, 3)
    want = ops.tile_conv(x, weight, None, plan, padding=1)
    assert want.is_contiguous(memory_format=torch.channels_last)
    for other in (x.contiguous(memory_format=torch.channels_last), x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), x.repeat(1, 2, 1, 1)[:, :8]):
        for filters in (weight.contiguous(memory_format=torch.channels_last), weight.transpose(0, 1).contiguous().transpose(0, 1)):
            assert torch.equal(ops.tile_conv(other, filters, None, plan, padding=1), want)


@pytest.mark.parametrize("edge", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pointwise_conv_equals_conv2d_and_stays_channels_last(edge: int, dtype: torch.dtype) -> None:
    x = torch.randn(9, 32, edge, edge, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(48, 32, 1, 1, dtype=dtype, requires_grad=True), torch.randn(48, dtype=dtype)
    got, want = pointwise_conv(x, weight, bias), F.conv2d(x, weight, bias)
    assert got.is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=10 * tolerance)
    for a, b in zip(*(torch.autograd.grad(y.float().sum(), (x, weight)) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"padding": 0}, ValueError, "12 x 20 map becomes 10 x 18"),
        ({"stride": (1, 2)}, ValueError, r"stride \(1, 2\)"),
        ({"stride": 3, "padding": 1}, ValueError, "stride"),
        ({"padding": (-1, 1, 1, 1)}, ValueError, "padding must not be negative"),
        ({"padding": (1, 1, 1)}, ValueError, "padding must be one or two integers"),
        ({"groups": 3}, ValueError, "weight must be"),
        ({"weight": torch.zeros(8, 7, 3, 3)}, ValueError, "C = 8"),
        ({"weight": torch.zeros(8, 8, 3)}, ValueError, "weight must be"),
        ({"weight": torch.zeros(8, 8, 3, 3).double()}, TypeError, "dtype of x"),
        ({"bias": torch.zeros(7)}, ValueError, "bias must be"),
        ({"x": torch.zeros(3, 8, 4, 4)}, ValueError, "T = "),
        ({"x": torch.zeros(3, 8, 4)}, ValueError, "tiles must be"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], words: str) -> None:
    plan = ops.build_plan(MASKS["mixed"], 4)
    arguments = {"x": torch.zeros(plan.num_tiles, 8, 4, 4), "weight": torch.zeros(8, 8, 3, 3), "bias": None, "padding": 1} | change
    with pytest.raises(error, match=words):
        ops.tile_conv(arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias"), plan, **arguments)
