"""Single convolutions on a GPU, bfloat16: packed tiles against the dense layer, channels-last; kernels alone (graph) and eager."""

from __future__ import annotations

from functools import partial

import torch
from mwm.bench.bench_layers import prepare
from mwm.bench.gpu_timing import event_timed, graph_timed
from mwm.bench.harness import Case
from mwm.bench.layer_list import LAYERS, SMOKE, Layer
from mwm.bench.settings import Settings

READINGS = {"graph": graph_timed, "eager": event_timed}


def layer_cases(bench: str, layers: list[Layer], settings: Settings, device: str) -> list[Case]:
    """Every layer, forward and forward + backward, over the hidden shares."""
    kinds = [(False, "forward"), (True, "forward + backward")]
    common = dict(dtype=torch.bfloat16, device=device)
    if settings.smoke:
        return [Case(bench, f"smoke: {layer.name}, {words}, {timing}",
                     partial(prepare, layer, 0.5, backward, batch=2, grid=3, smoke=True, reading=read, **common), 1)
                for layer in layers for backward, words in kinds for timing, read in READINGS.items()]
    found = []
    for hidden in settings.hidden or (0.6, 0.4, 0.25, 0.75):
        for layer in layers:
            for backward, words in kinds:
                for timing, read in READINGS.items():
                    if timing == "eager" and hidden != 0.6:
                        continue
                    name = f"{layer.net}: {layer.name}, {words}, {100 * hidden:g} % hidden, {timing}"
                    step = partial(prepare, layer, hidden, backward, batch=settings.batch or 128, reading=read, **common)
                    found.append(Case(bench, name, step, 9, extra=hidden != 0.6 or layer.net == "other nets"))
    return found


def cases(settings: Settings, device: str) -> list[Case]:
    """Convolutions with one group: 1x1, 3x3, strided, stem, patchify; the grouped ones of other nets."""
    chosen = [layer for layer in (SMOKE if settings.smoke else LAYERS) if layer.kind == "conv" and layer.groups != layer.channels]
    return layer_cases("gpu layers", chosen, settings, device)
