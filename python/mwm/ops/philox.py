"""The one random number generator: Philox4x32-10 on integer keys, a pure function of its arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import gpu, native, reference
from .backend import declare, resolve
from .registry import register

WORD = 1 << 32
_HALF = 1 << 16

declare("random_words", cpu=(torch.int64,), cuda=(torch.int64,), triton=(torch.int64,), reference=(torch.int64,))


def random_words(
    seed: int,
    ids: Tensor | Sequence[int] | int,
    epoch: int,
    view: int,
    stream: int,
    n: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """Draw n random 32-bit words for each id; equal on every backend, device and machine.

    Word j of id i is word ``j % 4`` of Philox4x32-10 with the key (seed mod 2³², seed div 2³²) and the counter
    ``(j // 4, id_i, epoch, stream * 2¹⁶ + view)`` (Salmon et al., SC 2011). It depends on nothing else, so that no state needs
    saving and neither batch, worker nor world size matters. ``words / 2**32`` in float64 is uniform in [0, 1).

    Args:
        seed: In [0, 2⁶⁴).
        ids: Integers in [0, 2³²): int64 tensor [B], a sequence, or one number.
        epoch: In [0, 2³²).
        view: In [0, 2¹⁶).
        stream: Purpose of the words, in [0, 2¹⁶). The ops of this package keep 0 to 15 for themselves; crops, flips, drop
            path and the like use 16 and more.
        n: Words per id.

    Returns:
        Unsigned 32-bit words. int64 [B, n]

    Raises:
        ValueError: An argument is outside its range.
    """
    ids = check_ids("random_words", ids)
    seed = check_counters("random_words", seed, epoch, view)
    if not 0 <= stream < _HALF:
        raise ValueError(f"random_words: stream must be in [0, 65536), got {stream}.")
    if n < 0:
        raise ValueError(f"random_words: n must not be negative, got {n}.")
    return _random_words(seed, ids, epoch, view, stream, n, backend or "")


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 itself, for tests and other uses; plain torch on any device.

    Args:
        counter: Words in [0, 2³²). int64 [..., 4]
        key: Words in [0, 2³²). int64 [..., 2]

    Returns:
        Random words. int64 [..., 4]
    """
    return reference.philox(counter, key)


def check_ids(op: str, ids: Tensor | Sequence[int] | int) -> Tensor:
    """`ids` as an int64 tensor [B]; their range is checked where they are read."""
    if not isinstance(ids, Tensor):
        ids = torch.tensor([ids] if isinstance(ids, int) else list(ids))  # without a dtype: with one, torch cuts 1.5 to 1
        ids = ids.to(torch.int64) if not ids.numel() else ids
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"{op}: ids must be integers in [0, 2**32), got {ids.dtype}.")
    if ids.dim() > 1:
        raise ValueError(f"{op}: ids must be [B], got {list(ids.shape)}.")
    return ids.reshape(-1).to(torch.int64)


def check_counters(op: str, seed: int, epoch: int, view: int) -> int:
    """Check seed, epoch and view; returns the seed as the signed 64-bit number of the same bits."""
    if not 0 <= seed < WORD * WORD:
        raise ValueError(f"{op}: seed must be in [0, 2**64), got {seed}.")
    if not 0 <= epoch < WORD:
        raise ValueError(f"{op}: epoch must be in [0, 2**32), got {epoch}.")
    if not 0 <= view < _HALF:
        raise ValueError(f"{op}: view must be in [0, 65536), got {view}.")
    return seed if seed < 1 << 63 else seed - (1 << 64)


def _implementation(seed: int, ids: Tensor, epoch: int, view: int, stream: int, n: int, backend: str) -> Tensor:
    name = resolve("random_words", backend, ids)
    if name == "reference":
        return reference.random_words(seed, ids, epoch, view, stream, n)
    words = torch.empty((ids.shape[0], n), dtype=torch.int64, device=ids.device)
    if name == "triton":
        with gpu.guard(ids):
            gpu.triton_kernels("philox").random_words(ids, seed, epoch, view, stream, words)
        return words
    arguments = native.view(ids), seed, epoch, view, stream, native.view(words)
    if name == "cuda":
        with gpu.guard(ids):
            gpu.cuda().random_words(*arguments, *gpu.launch(ids))
    else:
        native.core().random_words(*arguments, native.threads())
    return words


def _fake(seed: int, ids: Tensor, epoch: int, view: int, stream: int, n: int, backend: str) -> Tensor:
    return ids.new_empty((ids.shape[0], n))


_random_words = register(
    "random_words",
    "(SymInt seed, Tensor ids, SymInt epoch, SymInt view, SymInt stream, SymInt n, str backend) -> Tensor",
    _implementation,
    _fake,
)
