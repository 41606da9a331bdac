"""Noise of one value per image: drop path and channel dropout, by torch's generator or as a pure function of the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mwm.ops import random_words

from .operands import image_rows
from .packed import Packed

LAYER = "_mwm_layer"  # attribute that `sparsify` leaves on layers that draw noise: their number in the net
STREAM = 1 << 10  # layer n draws from stream STREAM + n of `random_words`; other rooms use the streams below


@dataclass(frozen=True)
class RandomState:
    """What the noise of the layers is a function of, besides the layer.

    Attributes:
        seed, epoch, view: as for the masks.
        ids: of the images of the batch, in [0, 2**32). int64 [B]
    """

    seed: int
    ids: Tensor
    epoch: int
    view: int


_current: RandomState | None = None


@contextmanager
def random_state(*, seed: int, ids: Tensor | Sequence[int], epoch: int, view: int = 0) -> Iterator[RandomState]:
    """Make drop path and channel dropout a pure function of (seed, id, epoch, view, layer) while it is open.

    Without it they draw from torch's generator. Training that resumes bit for bit opens it around each step.

    Args:
        seed: of the run.
        ids: of the images of the batch, in [0, 2**32). int64 [B]
        epoch: number of the epoch.
        view: number of the view of an image within an epoch.
    """
    global _current
    before = _current
    _current = RandomState(seed, torch.as_tensor(ids, dtype=torch.int64).reshape(-1), epoch, view)
    try:
        yield _current
    finally:
        _current = before


def keep_noise(images: int, channels: int, drop: float, layer: int | None, like: Tensor) -> Tensor:
    """1 with probability 1 - drop, else 0; from `random_state` where one is open and the layer has a number. [images, channels]"""
    state = _current
    if state is None or layer is None:
        return torch.empty((images, channels), dtype=like.dtype, device=like.device).bernoulli_(1.0 - drop)
    if len(state.ids) != images:
        raise ValueError(f"random_state: ids must have one number per image, got {len(state.ids)} for a batch of {images}.")
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("random_state: noise per image is drawn on the host, and a CUDA graph would repeat one draw for ever")
    words = random_words(state.seed, state.ids, state.epoch, state.view, STREAM + layer, channels)
    return (words >= round(drop * 2**32)).to(device=like.device, dtype=like.dtype)


def drop_path(x: Packed, drop: float, layer: int | None, *, scale: bool = True, per_batch: bool = False) -> Packed:
    """Set the residual branch of whole images to zero.

    Args:
        x: the branch. [T, C, t, t] or with other axes
        drop: probability.
        layer: number of the layer in its net, for `random_state`.
        scale: divide what is kept by its probability.
        per_batch: one draw for the whole batch, from the first image.
    """
    kept = keep_noise(x.plan.batch_size, 1, drop, layer, x._data)
    if per_batch:
        kept = kept[:1].expand(x.plan.batch_size, 1)
    if scale and drop < 1.0:
        kept = kept / (1.0 - drop)
    return x._like(x._data * image_rows(kept, x.plan).reshape(-1, *[1] * (x.dim() - 1)))


def drop_channels(x: Packed, drop: float, layer: int | None) -> Packed:
    """Dropout2d: set whole channels of an image to zero and scale the others. [T, C, t, t]"""
    kept = keep_noise(x.plan.batch_size, x._data.shape[1], drop, layer, x._data)
    kept = kept / (1.0 - drop) if drop < 1.0 else kept
    return x._like(x._data * image_rows(kept, x.plan)[:, :, None, None])


def drop_branch(module: nn.Module, x: Packed, drop: float, *, scale: bool = True, per_batch: bool = False) -> Packed:
    """drop_path with the number of the layer that `sparsify` left on the module."""
    return drop_path(x, drop, module.__dict__.get(LAYER), scale=scale, per_batch=per_batch)
