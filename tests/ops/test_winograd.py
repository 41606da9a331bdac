"""3x3 convolutions by minimal filtering, packed and dense, against dense conv2d; and when they are chosen."""

from __future__ import annotations

from collections.abc import Iterator

import harness
import pytest
import torch
import torch.nn.functional as F
from conv_cases import MASKS, Conv
from torch import Tensor

from mwm import _core, ops
from mwm.ops import winograd


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with harness.num_threads(1):
        yield


@pytest.fixture
def any_channels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Small layers take the kernels of the large ones; lists which were called."""
    calls: list[str] = []

    class Listed:
        def __getattr__(self, name: str):
            calls.append(name)
            return getattr(_core, name)

    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 1)
    monkeypatch.setattr(winograd, "LEAST_SQUARES_AT_2", 0)
    monkeypatch.setattr(winograd.native, "core", Listed)
    return calls


LAYERS = {
    "t2": Conv(9, 17, (3, 3), 2, padding=1),
    "t3": Conv(5, 20, (3, 3), 3, padding=1, bias=False),
    "t4": Conv(20, 7, (3, 3), 4, padding=1),
    "t7": Conv(33, 70, (3, 3), 7, padding=1),
    "t8": Conv(40, 40, (3, 3), 8, padding=1, bias=False),
}


@pytest.mark.parametrize("case", LAYERS)
def test_small_integers_are_exact_on_every_instruction_set(case: str, isa: str, any_channels: list[str]) -> None:
    plan = ops.build_plan(MASKS["mixed"], LAYERS[case].edge)
    harness.check(LAYERS[case].run(plan, "cpu"), LAYERS[case].oracle(plan), LAYERS[case].inputs(plan, exact=True), exact=True)
    assert any_channels.count("winograd_conv") >= 2, "the direct kernel ran"
    assert ("winograd_grad_weight" in any_channels) == (LAYERS[case].edge >= 4)


@pytest.mark.parametrize("name", [name for name in MASKS if name != "mixed"])
@pytest.mark.parametrize("case", ["t2", "t4", "t7"])
def test_every_mask_is_exact(case: str, name: str, any_channels: list[str]) -> None:
    plan = ops.build_plan(MASKS[name], LAYERS[case].edge)
    harness.check(LAYERS[case].run(plan, "cpu"), LAYERS[case].oracle(plan), LAYERS[case].inputs(plan, exact=True), exact=True)


@pytest.mark.parametrize("edge", [8, 9, 14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels, filters", [(3, 20), (48, 24), (130, 64)])
def test_error_stays_within_the_budget_of_dense_torch(channels: int, filters: int, dtype: torch.dtype, edge: int, any_channels: list[str]) -> None:
    conv = Conv(channels, filters, (3, 3), edge, padding=1)
    plan = ops.build_plan(MASKS["mixed"], edge)
    harness.check(conv.run(plan, "cpu"), conv.oracle(plan), conv.inputs(plan), dtype=dtype, threads=(1,))
    assert {"winograd_conv", "winograd_grad_weight"} <= set(any_channels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_stays_within_the_budget_on_every_instruction_set(dtype: torch.dtype, isa: str, any_channels: list[str]) -> None:
    conv = Conv(50, 70, (3, 3), 8, padding=1)
    plan = ops.build_plan(MASKS["square 7"], 8)
    harness.check(conv.run(plan, "cpu"), conv.oracle(plan), conv.inputs(plan), dtype=dtype, threads=(1, 2))


@pytest.mark.parametrize("channels, filters", [(256, 256), (768, 32)])
def test_many_channels_stay_within_the_budget(channels: int, filters: int) -> None:
    """The widest layers of ResNet-50 and of the decoder, where rounding errors of the products are largest."""
    generator = torch.Generator().manual_seed(3)
    inputs = [harness.normals((1, channels, 14, 14), generator), harness.normals((filters, channels, 3, 3), generator), None]
    harness.check(ops.conv3x3, lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1), inputs, threads=(1, 2))


@pytest.mark.parametrize("shape", [(2, 5, 7, 10), (1, 33, 9, 4), (3, 16, 2, 12), (0, 4, 8, 8)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels-last", "contiguous"])
def test_dense_maps_of_any_size_are_exact(shape: tuple[int, ...], layout: torch.memory_format, any_channels: list[str]) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [harness.integers(size, generator) for size in (shape, (20, shape[1], 3, 3), (20,))]
    inputs = [inputs[0].contiguous(memory_format=layout), *inputs[1:]]
    harness.check(ops.conv3x3, lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1), inputs, exact=True)


def test_filters_of_any_strides_give_the_same_bits(any_channels: list[str]) -> None:
    x, weight = torch.randn(2, 30, 8, 8), torch.randn(40, 30, 3, 3)
    wide = torch.randn(40, 30, 3, 6)
    wide[..., ::2] = weight
    forms = [weight, weight.contiguous(memory_format=torch.channels_last), wide[..., ::2], weight.transpose(0, 1).contiguous().transpose(0, 1)]
    results = [ops.conv3x3(x, form) for form in forms]
    assert all(torch.equal(result, results[0]) for result in results)
    assert len(any_channels) == 4


def test_a_hidden_neighbour_is_never_read() -> None:
    """Tiles that are not in the plan cannot reach a result: the same tiles give the same bits alone and beside others."""
    mask = torch.zeros(1, 3, 3, dtype=torch.bool)
    mask[0, 1, 1] = True
    plan = ops.build_plan(mask, 4)
    x, weight = torch.randn(1, 32, 4, 4), torch.randn(32, 32, 3, 3)
    assert torch.equal(ops.tile_conv(x, weight, None, plan, padding=1), ops.conv3x3(x, weight))


def test_doubling_is_exact_with_its_derivatives() -> None:
    generator = torch.Generator().manual_seed(2)
    for shape in ((2, 6, 7, 7), (1, 6, 16, 16), (2, 6, 5, 9)):
        inputs = [harness.integers(size, generator) for size in (shape, (6, 10, 4, 4), (10,))]
        harness.check(ops.conv_transpose4x4, lambda x, weight, bias: F.conv_transpose2d(x, weight, bias, 2, 1), inputs, exact=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("edge", [7, 14, 20])
def test_doubling_stays_within_the_budget(edge: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = [harness.normals(size, generator) for size in ((2, 40, edge, edge), (40, 24, 4, 4), (24,))]
    # At 20 torch computes, whose own sums in bfloat16 depend on the number of threads.
    threads = (1,) if edge > 14 else (1, 2)
    harness.check(ops.conv_transpose4x4, lambda x, weight, bias: F.conv_transpose2d(x, weight, bias, 2, 1), inputs, dtype=dtype, threads=threads)


def test_autocast_casts_as_for_conv2d() -> None:
    x, weight, up = torch.randn(1, 32, 16, 16), torch.randn(32, 32, 3, 3), torch.randn(32, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.conv3x3(x, weight).dtype == ops.conv_transpose4x4(x, up).dtype == torch.bfloat16
        assert torch.equal(ops.conv3x3(x, weight), ops.conv3x3(x.bfloat16(), weight.bfloat16()))


def test_float64_stays_with_torch_and_passes_gradcheck() -> None:
    x, weight, bias = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((1, 2, 4, 4), (2, 2, 3, 3), (2,)))
    assert torch.autograd.gradcheck(ops.conv3x3, (x, weight, bias))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of opcheck itself
@pytest.mark.parametrize("op", ["conv3x3", "conv_transpose4x4"])
def test_the_registered_ops_pass_opcheck(op: str) -> None:
    x = torch.randn(2, 24, 6, 6, requires_grad=True)
    weight = torch.randn(*((24, 24, 3, 3) if op == "conv3x3" else (24, 8, 4, 4)), requires_grad=True)
    bias = torch.randn(24 if op == "conv3x3" else 8, requires_grad=True)
    torch.library.opcheck(getattr(torch.ops.mwm, op).default, (x, weight, bias), atol=1e-4, rtol=1e-4)


def test_bad_filters_are_named() -> None:
    x = torch.randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match=r"weight must be \[K, C, 3, 3\]"):
        ops.conv3x3(x, torch.randn(4, 4, 5, 5))
    with pytest.raises(ValueError, match=r"weight must be \[C, K, 4, 4\]"):
        ops.conv_transpose4x4(x, torch.randn(5, 4, 4, 4))


def test_the_table_leaves_to_the_direct_kernel_what_it_does_better() -> None:
    plain = [1] * 8

    def choice(shape: tuple[int, ...], filters: int, dtype: torch.dtype = torch.float32, *, geometry: list[int] = plain, weight: bool = False) -> int:
        return winograd.square_edge(torch.empty(shape, dtype=dtype), (filters, shape[1], 3, 3), geometry, weight_gradient=weight)

    assert choice((160, 64, 8, 8), 64) == choice((160, 256, 2, 2), 256) == 2
    assert choice((160, 256, 2, 2), 256, weight=True) == choice((160, 512, 1, 1), 512) == 0
    assert choice((96, 256, 2, 2), 256) == 0 and choice((24, 128, 4, 4), 128) == 2
    assert choice((160, 16, 8, 8), 64) == choice((160, 64, 8, 8), 64, torch.float64) == 0
    assert choice((160, 64, 8, 8), 64, geometry=[2, *plain[1:]]) == choice((160, 64, 8, 8), 64, geometry=[*plain[:7], 2]) == 0
    assert choice((8, 192, 56, 56), 192, torch.bfloat16) == 4
    assert choice((8, 768, 14, 14), 768, torch.bfloat16) == choice((160, 128, 4, 4), 128, torch.bfloat16) == 0


def test_the_core_refuses_what_does_not_fit() -> None:
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    coords, slots = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 1, 1, dtype=torch.int32)
    coords[1, 0] = 1
    slots[1] = 1

    filters = torch.randn(4, 4, 3, 3)

    def call(weight: Tensor = filters, edge: int = 2, workspace: int = 16 * 4 * 16, slots: Tensor = slots) -> None:
        out, room = torch.empty_like(x), torch.empty(workspace)  # named: a view does not keep its tensor alive
        _core.winograd_conv(*map(winograd.native.view, (x, weight, None, coords, slots)), edge, 0, winograd.native.view(room),
                            winograd.native.view(out), 1)

    call()
    for bad, words in (({"edge": 3}, "2 or 4"), ({"workspace": 10}, "workspace"), ({"weight": torch.randn(4, 5, 3, 3)}, "channels"),
                       ({"slots": slots + 1}, "slots"), ({"weight": torch.randn(4, 4, 5, 5)}, "3, 3")):
        with pytest.raises(ValueError, match=words):
            call(**bad)
