"""`tile_conv` in Triton against dense conv2d on the unpacked map: values and gradients, through the public op."""

from __future__ import annotations

from collections.abc import Callable

import harness
import numpy as np
import pytest
import torch
from conv_cases import Conv
from torch import Tensor

from mwm import ops
from mwm.ops import gpu

# An image without a visible patch between others; height and width differ.
ACTIVE = torch.tensor([[[1, 0, 1], [0, 1, 1]], [[0, 0, 0], [0, 0, 0]], [[1, 1, 0], [1, 0, 0]]], dtype=torch.bool)
FEW = torch.tensor([[[1, 1, 0], [0, 1, 0]], [[0, 0, 0], [0, 0, 0]]], dtype=torch.bool)  # for large tiles

CONVS = {
    "3x3 t8": Conv(16, 20, (3, 3), 8, padding=1),
    "3x3 t4": Conv(24, 40, (3, 3), 4, padding=1, bias=False),
    "3x3 t3": Conv(17, 6, (3, 3), 3, padding=1),
    "3x3 t2": Conv(33, 20, (3, 3), 2, padding=1),
    "3x3 t1": Conv(20, 70, (3, 3), 1, padding=1),
    "3x3/2 t8": Conv(16, 24, (3, 3), 8, stride=2, padding=1, bias=False),
    "3x3/2 t2": Conv(20, 18, (3, 3), 2, stride=2, padding=1),
    "3x3/2 same": Conv(6, 7, (3, 3), 4, stride=2, padding=(0, 1, 0, 1)),
    "3x3/3 t3": Conv(5, 6, (3, 3), 3, stride=3),
    "stem 7x7/2": Conv(3, 24, (7, 7), 8, stride=2, padding=3, bias=False),
    "stem of one channel": Conv(1, 20, (7, 7), 4, stride=2, padding=3),
    "5x5 dilated by 2": Conv(16, 8, (5, 5), 2, padding=4, dilation=2),
    "dilated by stride": Conv(6, 8, (3, 3), 4, stride=2, padding=(1, 2, 1, 2), dilation=2),
    "dilated unevenly": Conv(6, 8, (3, 3), 2, padding=(1, 3), dilation=(1, 3)),
    "7x7 t1": Conv(20, 18, (7, 7), 1, padding=3),
    "5x5 t1": Conv(16, 9, (5, 5), 1, padding=2, bias=False),
    "5x5 t2": Conv(18, 5, (5, 5), 2, padding=2),
    "even kernel": Conv(6, 8, (4, 2), 4, padding=(0, 1, 1, 2)),
    "11x1 band": Conv(6, 8, (11, 1), 1, padding=(0, 0, 5, 5)),
    "groups of 4": Conv(12, 12, (3, 3), 2, padding=1, groups=3),
    "groups of 20": Conv(40, 36, (3, 3), 2, stride=2, padding=1, groups=2, bias=False),
    "groups of 3 to 5": Conv(9, 15, (3, 3), 2, padding=1, groups=3),
    "1x1": Conv(130, 70, (1, 1), 2),
    "1x1/2": Conv(32, 48, (1, 1), 2, stride=2, bias=False),
    "4x4 patchify": Conv(3, 16, (4, 4), 4, stride=4),
}


@pytest.fixture(autouse=True)
def _bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies the bit patterns of bfloat16 as integers; here it multiplies the numbers."""
    if not gpu.interpreted():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def widened(handle: object) -> object:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: plain(self, widened(a), widened(b), *rest))


def _run(conv: Conv, plan: ops.TilePlan, device: str) -> Callable[..., Tensor]:
    """The op on the device, with inputs and result on the CPU."""
    moved = conv.run(plan.to(device), "triton")
    return lambda *inputs: moved(*(None if x is None else x.to(device) for x in inputs)).cpu()


@pytest.mark.parametrize("case", CONVS)
def test_small_integers_are_exact(case: str, device: str) -> None:
    conv = CONVS[case]
    plan = ops.build_plan(ACTIVE if conv.edge < 4 else FEW, conv.edge)
    harness.check(_run(conv, plan, device), conv.oracle(plan), conv.inputs(plan, exact=True), exact=True, threads=(1,))


@pytest.mark.parametrize(("case", "name"), [*(("3x3/2 t2", name) for name in harness.masks() if name not in ("mixed", "square 7")),
                                             *(("5x5 t1", name) for name in ("single tile", "checkerboard", "all hidden"))])
def test_every_mask_is_exact(case: str, name: str, device: str) -> None:
    conv = CONVS[case]
    plan = ops.build_plan(harness.masks()[name], conv.edge)
    harness.check(_run(conv, plan, device), conv.oracle(plan), conv.inputs(plan, exact=True), exact=True, threads=(1,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["3x3/2 t8", "groups of 20"])
def test_error_stays_within_the_budget_of_dense_torch(case: str, dtype: torch.dtype, device: str) -> None:
    conv = CONVS[case]
    plan = ops.build_plan(ACTIVE if conv.edge < 4 else FEW, conv.edge)
    harness.check(_run(conv, plan, device), conv.oracle(plan), conv.inputs(plan), dtype=dtype, threads=(1,))


@pytest.mark.parametrize(("kernel", "edge", "stride"), [((3, 3), 2, 1), ((3, 3), 2, 2), ((5, 3), 1, 1)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_an_impulse_meets_every_tap_at_every_border(groups: int, kernel: tuple[int, int], edge: int, stride: int, device: str) -> None:
    """One image per position; the filter has a different number at every tap, so that no two taps can be exchanged."""
    active = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    positions = 6 * edge * edge
    plan = ops.build_plan(active.expand(positions, 2, 3).contiguous(), edge)
    images = torch.eye(positions).reshape(positions, 1, 2 * edge, 3 * edge).repeat(1, 2, 1, 1)
    weight = torch.arange(1.0, 1 + 4 // groups * kernel[0] * kernel[1]).reshape(2, 2 // groups, *kernel)
    padding = ((kernel[0] - 1) // 2, (kernel[1] - 1) // 2)
    conv = Conv(2, 2, kernel, edge, stride, padding, groups=groups)
    x = ops.pack_tiles(images, plan)
    assert torch.equal(_run(conv, plan, device)(x, weight, None), conv.oracle(plan)(x, weight, None))


@pytest.mark.parametrize("case", ["3x3 t2", "3x3 t1"])
def test_tiles_beyond_the_reach_of_a_window_are_not_read(case: str, device: str) -> None:
    conv = CONVS[case]
    plan = ops.build_plan(torch.tensor([[[1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]]]).bool(), conv.edge)
    x, weight, bias = (tensor.float() for tensor in conv.inputs(plan))
    run = _run(conv, plan, device)
    clean = run(x, weight, bias)
    x[1] = torch.nan  # the tile in row 0, column 2: the neighbour of one tile only
    found = run(x, weight, bias)
    assert found[1].isnan().any() and found[2].isnan().any()
    assert torch.equal(found[[0, 3, 4]], clean[[0, 3, 4]])


@pytest.mark.parametrize("case", ["3x3/2 t2"])
def test_every_element_is_written(case: str, device: str) -> None:
    conv = CONVS[case]
    plan = ops.build_plan(ACTIVE if conv.edge < 4 else FEW, conv.edge)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty gives NaN
    try:
        harness.check(_run(conv, plan, device), conv.oracle(plan), conv.inputs(plan, exact=True), exact=True, threads=(1,))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


BETWEEN = {
    "3x3": (3, 1, 1, False),
    "3x3 strided": (3, 2, 1, False),
    "4x4 transposed": (4, 2, 1, True),
    "2x2 transposed": (2, 2, 0, True),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_from_the_tiles_of_one_plan_to_those_of_another(name: str, device: str) -> None:
    kernel, stride, padding, transposed = BETWEEN[name]
    source, target = ops.build_plan(ACTIVE, 4), ops.build_plan(~ACTIVE, 4)
    generator = torch.Generator().manual_seed(1)
    shape = (18, 10, kernel, kernel) if transposed else (10, 18, kernel, kernel)
    inputs = [harness.integers(s, generator) for s in ((source.num_tiles, 18, 2, 2), shape, (10,))]
    options = dict(stride=stride, padding=padding, transposed=transposed)

    def ours(*given: Tensor) -> Tensor:
        moved = [x.to(device) for x in given]
        return ops.tile_conv_between(*moved, source.to(device), target.to(device), **options, backend="triton").cpu()

    harness.check(ours, lambda *given: ops.tile_conv_between(*given, source, target, **options, backend="reference"), inputs, exact=True, threads=(1,))


def test_offsets_reach_beyond_two_to_the_31_elements(device: str) -> None:
    """The only neighbour lies in the last tile of a map of more than 2^31 elements, most of which is never touched."""
    tiles = 2**31 // (32 * 64) + 1
    x = torch.empty((tiles, 32, 8, 8), dtype=torch.float16, device=device, memory_format=torch.channels_last)
    x[0], x[-1] = 0, 1
    weight = torch.ones((1, 32, 1, 3), dtype=torch.float16, device=device)
    coords = torch.tensor([[0, 0, 0]], dtype=torch.int32, device=device)
    slots = torch.tensor([[[0, tiles - 1]]], dtype=torch.int32, device=device)
    out = torch.empty((1, 1, 8, 8), dtype=torch.float16, device=device)
    with gpu.guard(x):
        gpu.triton_kernels("tile_conv").forward(x, weight, None, coords, slots, [1, 1, 1, 1, 1, 0, 0, 1], out)
    want = torch.zeros(8, 8)
    want[:, 7] = 32
    assert torch.equal(out[0, 0].float().cpu(), want)
    grad = torch.empty((1, 32, 1, 3), dtype=torch.float16, device=device, memory_format=torch.channels_last)
    with gpu.guard(x):
        gpu.triton_kernels("tile_conv_weight").grad_weight(torch.ones_like(out), x, coords, slots, [1, 1, 1, 1, 1, 0, 0, 1], grad)
    assert torch.equal(grad[0].float().cpu(), torch.tensor([[0.0, 0.0, 8.0]]).expand(32, 1, 3))


def test_more_positions_than_32_bits_count_are_refused() -> None:
    kernels = gpu.triton_kernels("tile_conv")
    huge, small = torch.empty((2**25, 1, 8, 8), device="meta"), torch.empty((1, 1, 3, 3), device="meta")
    with pytest.raises(ValueError, match="positions of the input must be at most"):
        kernels.check_sizes(huge.shape, small.shape, small.shape, small.shape, 1)


@pytest.mark.parametrize("blocks", [1, 3, 7, 64, 1000])
@pytest.mark.parametrize(("programs", "numel"), [(1, 10), (9, 36864), (144, 2359296), (5000, 2**28)])
def test_shares_cover_every_block_of_positions_once(blocks: int, programs: int, numel: int) -> None:
    kernels = gpu.triton_kernels("tile_conv_weight")
    shares, each = kernels.shares_of(blocks, programs, 528, numel)
    assert shares >= 1 and (shares - 1) * each < blocks <= shares * each
    assert shares == 1 or shares * numel <= kernels.MOST_PARTIAL


@pytest.mark.parametrize("direction", ["forward", "grad_input", "grad_weight"])
def test_tuning_finds_a_config_that_computes_the_same(direction: str, device: str) -> None:
    from mwm.bench import tune

    trial = tune.Trial(tune.TuneLayer(2, 16, 16), device, batch=2, grid=(2, 2))
    lines: list[str] = []
    config = tune.best(trial, direction, quick=True, table="generic", say=lines.append)
    assert {key: value for key, value in config.items() if key != "dense_from"} in tune.candidates(direction, trial.layer, quick=True)
    assert "dense is faster from" in lines[-1]
