"""Depthwise convolutions on a GPU, bfloat16: packed tiles against cuDNN, channels-last."""

from __future__ import annotations

from mwm.bench.gpu_layers import layer_cases
from mwm.bench.harness import Case
from mwm.bench.layer_list import LAYERS, SMOKE
from mwm.bench.settings import Settings


def cases(settings: Settings, device: str) -> list[Case]:
    """7x7 of ConvNeXt at t = 8, 4, 2, 1; 3x3 and 5x5 of other nets."""
    chosen = [layer for layer in (SMOKE if settings.smoke else LAYERS) if layer.kind == "conv" and layer.groups == layer.channels > 1]
    return layer_cases("gpu depthwise", chosen, settings, device)
