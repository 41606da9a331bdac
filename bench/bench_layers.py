"""Single layers of ResNet-50 and ConvNeXt-T on packed tiles, against the dense layer, channels-last, in the same process.

Every layer is the module a network holds, sparsified, and runs twice: the forward pass alone, and forward plus backward (input and
weight gradients, as in training). Linear cost would give 1 / visible; more is possible where hidden neighbours are skipped. The
limit of convolutions is arithmetic (products of visible inputs with visible outputs only), that of pools and norms memory traffic
(every visible input and output once in each pass).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from mwm.bench.harness import Case, Check, Limit, Match, Reading, Step, relative_difference, timed
from mwm.bench.layer_list import LAYERS, SMOKE, Layer
from mwm.bench.limits import byte_limit, flop_limit
from mwm.bench.mask_multiply import MaskMultiply
from mwm.bench.settings import Settings
from torch import Tensor, nn
from torch.nn import functional as F

import mwm
from mwm import ops

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def prepare(layer: Layer, hidden: float, backward: bool, *, batch: int = 8, grid: int = 7, dtype: torch.dtype = torch.float32, smoke: bool = False,
            device: str = "cpu", reading: Callable[[Step, str], Reading] | None = None) -> Match:
    """Check one layer against mask-multiply with the same weights, then make both sides; `reading` times them on a GPU."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    patches = grid * grid
    visible = patches - round(hidden * patches)
    active = (torch.rand(batch, patches, generator=generator).argsort(1) < visible).view(batch, grid, grid).to(device)
    plan = ops.build_plan(active, layer.edge, visible=visible)
    dense_layer = layer.module().to(device, dtype).to(memory_format=torch.channels_last).train()
    masked_layer = MaskMultiply(nn.Sequential(copy.deepcopy(dense_layer)))
    our_layer = mwm.sparsify(copy.deepcopy(dense_layer))
    size = grid * layer.edge
    dense = torch.randn(batch, layer.channels, size, size, generator=generator).to(device, dtype).contiguous(memory_format=torch.channels_last)
    tiles = ops.pack_tiles(dense, plan)
    if layer.needs_gradient:
        dense.requires_grad_()
        tiles.requires_grad_()
    permuted = layer.permuted

    def ours() -> Tensor:
        packed = mwm.Packed(tiles, plan)
        return (our_layer(packed.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if permuted else our_layer(packed)).tiles

    def rival() -> Tensor:
        return dense_layer(dense.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if permuted else dense_layer(dense)

    with torch.no_grad():
        got = ours()
        # A layer norm over channels acts per position: the dense one is right where it is visible.
        want = rival() if permuted else masked_layer(dense, active)
        difference = relative_difference(got, ops.pack_tiles(want.contiguous(memory_format=torch.channels_last), plan))
        whole = rival()
    mine, theirs = ours, rival
    if backward:
        mine = _both(ours, [*([tiles] if layer.needs_gradient else []), *our_layer.parameters()], torch.randn_like(got))
        theirs = _both(rival, [*([dense] if layer.needs_gradient else []), *dense_layer.parameters()], torch.randn_like(whole))
    else:
        mine, theirs = torch.no_grad()(mine), torch.no_grad()(theirs)
    read = timed if reading is None else lambda step: reading(step, device)
    return Match(read(mine), {"dense channels-last": read(theirs)}, {"dense channels-last": Check(difference, TOLERANCE[dtype])},
                 visible=visible / patches, limit=_limit(layer, active, got, tiles, backward, smoke) if reading is None else None)


def _both(function: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(), leaves, grad)


def _limit(layer: Layer, active: Tensor, output: Tensor, tiles: Tensor, backward: bool, smoke: bool) -> Limit:
    if layer.kind == "conv":
        passes = (3 if layer.needs_gradient else 2) if backward else 1
        products = needed_products(active, layer) * layer.channels // layer.groups * layer.filters
        return flop_limit(2e-9 * products * passes, tiles.dtype, smoke=smoke)
    forward = tiles.nbytes + output.nbytes
    # Backward: the output's gradient is read and the input's written; a norm reads its input again.
    back = forward + (tiles.nbytes if layer.kind != "max-pool" else 0)
    return byte_limit(1e-9 * (forward + (back if backward else 0)))


def needed_products(active: Tensor, layer: Layer) -> int:
    """Pairs of a visible output position and a visible input position in its window, over the batch."""
    visible = active[:, None].double()
    inputs = visible.repeat_interleave(layer.edge, 2).repeat_interleave(layer.edge, 3)
    edge = layer.edge // layer.stride
    outputs = visible.repeat_interleave(edge, 2).repeat_interleave(edge, 3)
    counts = F.conv2d(inputs, torch.ones(1, 1, layer.kernel, layer.kernel, dtype=torch.double), None, layer.stride, layer.padding)
    return int((counts * outputs).sum())


def cases(settings: Settings) -> list[Case]:
    """Both nets' layers at 60 % hidden and at 15 %, where none may lose; layers of other nets at 60 %."""
    kinds = [(False, "forward"), (True, "forward + backward")]
    dtypes = [torch.bfloat16] if settings.bf16 else [torch.float32, torch.bfloat16] if settings.smoke else [torch.float32]
    if settings.smoke:
        return [Case("layers", f"smoke: {layer.name}, {words}{_type(dtype)}", partial(prepare, layer, 0.5, backward, batch=2, grid=3, dtype=dtype, smoke=True), 1)
                for dtype in dtypes for layer in SMOKE for backward, words in kinds]
    return [Case("layers", f"{layer.net}: {layer.name}, {words}, {100 * hidden:g} % hidden{_type(dtype)}",
                 partial(prepare, layer, hidden, backward, batch=settings.batch or 8, dtype=dtype), 7, extra=layer.net == "other nets")
            for dtype in dtypes for hidden in settings.hidden or (0.6, 0.15) for layer in LAYERS for backward, words in kinds
            if settings.hidden or hidden == 0.6 or layer.net != "other nets"]


def _type(dtype: torch.dtype) -> str:
    return ", bfloat16" if dtype == torch.bfloat16 else ""
