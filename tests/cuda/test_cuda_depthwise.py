"""Depthwise convolution of the CUDA sources against dense conv2d on the unpacked map."""

from __future__ import annotations

from dataclasses import replace

import harness
import pytest
import torch
from conv_cases import DEPTHWISE, MASKS, Conv
from emulator import Target

from mwm import ops
from mwm.ops import reference

#: The usual shapes have kernels of their own where the number of channels is even.
USUAL = {
    f"{kernel}x{kernel} t{edge} {channels}": Conv(channels, channels, (kernel, kernel), edge, 1, kernel // 2, 1, channels, edge != 2)
    for kernel in (3, 5, 7)
    for edge in (1, 2, 4, 8)
    for channels in (6, 70)
}
OTHERS = {name: case for name, case in DEPTHWISE.items() if name.endswith((" 3", " 37"))}


def _check(conv: Conv, mask: torch.Tensor, target: Target, dtype: torch.dtype = torch.float32, exact: bool = True) -> None:
    target.require("depthwise_conv", dtype)
    plan = ops.build_plan(mask, conv.edge, backend="reference").to(target.device)
    inputs = [None if x is None else x.to(target.device) for x in conv.inputs(plan, exact=exact)]
    # conv_cases draws on the CPU; the gradient that harness draws follows the output.
    harness.check(conv.run(plan, target.backend), conv.oracle(plan), inputs, dtype=dtype, exact=exact, threads=(1,))


@pytest.mark.parametrize("case", USUAL)
def test_small_integers_are_exact_for_the_usual_shapes(case: str, target: Target) -> None:
    _check(USUAL[case], MASKS["mixed"], target)


@pytest.mark.parametrize("case", OTHERS)
def test_small_integers_are_exact_for_any_shape(case: str, quick: Target) -> None:
    _check(OTHERS[case], MASKS["mixed"], quick)


@pytest.mark.parametrize("name", [name for name in MASKS if name != "mixed"])
@pytest.mark.parametrize("case", ["7x7 t8 6", "7x7 t1 70", "3x3 t2 6", "5x5 t1 6"])
def test_every_mask_is_exact(case: str, name: str, quick: Target) -> None:
    _check(USUAL[case], MASKS[name], quick)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["7x7 t8 70", "7x7 t4 70", "7x7 t1 70", "5x5 t2 70", "3x3 t8 70"])
def test_errors_are_those_of_torchs_dense_op(case: str, dtype: torch.dtype, quick: Target) -> None:
    _check(USUAL[case], MASKS["square 7"], quick, dtype, exact=False)


def test_many_tiles_take_several_passes_and_many_shares(quick: Target) -> None:
    """More tiles than a block takes at once; sums stay exact."""
    conv = replace(USUAL["7x7 t1 6"], channels=2, filters=2, groups=2)
    mask = torch.rand((4, 70, 70), generator=torch.Generator().manual_seed(4)) < 0.9
    _check(conv, mask, quick)


def test_hidden_nan_never_reaches_an_output(quick: Target) -> None:
    """Tiles of a larger plan that this one hides are NaN: they may lie next to what is read, but must not be read."""
    quick.require("depthwise_conv")
    for case in ("7x7 t4 6", "7x7 t1 6", "5x5 t2 6"):
        conv = USUAL[case]
        mask = MASKS["mixed"]
        plan = ops.build_plan(mask, conv.edge, backend="reference").to(quick.device)
        x, weight, bias = (None if t is None else t.float().to(quick.device) for t in conv.inputs(plan))
        guard = torch.full((plan.num_tiles + 2, *x.shape[1:]), torch.nan, device=quick.device).to(memory_format=torch.channels_last)
        guard[1:-1] = x
        found = conv.run(plan, quick.backend)(guard[1:-1], weight, bias)
        assert torch.equal(found, conv.run(plan, quick.backend)(x, weight, bias))
        assert not found.isnan().any()


def test_a_second_derivative_is_refused(quick: Target) -> None:
    quick.require("depthwise_conv")
    conv = USUAL["3x3 t2 6"]
    plan = ops.build_plan(MASKS["mixed"], conv.edge, backend="reference").to(quick.device)
    x, weight, _ = (None if t is None else t.float().to(quick.device).requires_grad_() for t in conv.inputs(plan))
    (grad,) = torch.autograd.grad(conv.run(plan, quick.backend)(x, weight, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


def test_sources_beyond_two_to_the_31_elements_are_read_right(emulated: object) -> None:
    """A slot that points far into five gigabytes that are never touched elsewhere; one target tile."""
    import emulator

    from mwm.ops import native

    channels, edge, far = 64, 8, 600_000
    x = torch.empty(0, dtype=torch.bfloat16).set_(torch.empty((far + 1) * channels * edge * edge, dtype=torch.bfloat16).untyped_storage()).view(far + 1, edge, edge, channels)
    x[far] = torch.randint(-2, 3, (edge, edge, channels)).to(torch.bfloat16)
    coords, slots = torch.tensor([[0, 0, 0]], dtype=torch.int32), torch.tensor([[[far]]], dtype=torch.int32)
    weight = torch.randint(-1, 2, (channels, 1, 3, 3)).to(torch.bfloat16)
    out = torch.full((1, channels, edge, edge), torch.nan, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    with emulator.backend_on_cpu(emulated):
        emulated.depthwise_forward(*map(native.view, (x.permute(0, 3, 1, 2), weight, None, coords, slots)), [1, 1, 1, 1, 1, 1, 1, channels], native.view(out), 0, 0)
    active = torch.ones((1, 1, 1), dtype=torch.bool)
    tile = x[far:].permute(0, 3, 1, 2).float()
    expected = reference.pack_tiles(torch.nn.functional.conv2d(tile, weight.float(), None, 1, 1, 1, channels), active)
    assert torch.equal(out.float(), expected)
