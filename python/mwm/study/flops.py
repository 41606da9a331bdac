"""Arithmetic of an encoder, for the compute columns of the tables."""

from __future__ import annotations

import functools

import torch

from mwm.train.export import full_model


@functools.cache
def dense_gflop(encoder: str, size: tuple[int, int], channels: int) -> float:
    """GFLOP of one forward pass of the dense encoder on one image, a multiply-add counted as two; convolutions and matrix products.

    The sparse encoder does this times the visible share: exactly for 1 x 1 convolutions, and at most for larger ones, whose hidden neighbours are skipped.

    Args:
        encoder: timm's name, or "torchvision/NAME".
        size: Height and width, pixels.
        channels: Of the image.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        if encoder.startswith("torchvision/"):
            model = full_model(encoder, channels, 1)
        else:
            import timm

            model = timm.create_model(encoder, in_chans=channels, num_classes=0)
        model.eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, channels, *size))
    return counter.get_total_flops() / 1e9
