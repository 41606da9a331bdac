"""Stratified sampling of visible patches with exact counts, integers only."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from . import gpu, native, reference
from .backend import INTEGERS, declare, resolve
from .constants import LOG2_TABLE
from .philox import WORD, check_counters, check_ids
from .registry import register

MAX_PATCHES = 1 << 20
_WEIGHT_ONE = 65535

declare("sample_active", cpu=INTEGERS, cuda=INTEGERS, triton=INTEGERS, reference=INTEGERS)


def to_q32(ratio: float | Sequence[float] | Tensor) -> int | Tensor:
    """Probability as a Q32 integer: ratio * 2³² rounded half to even.

    Args:
        ratio: One probability in [0, 1], or several.

    Returns:
        An int for one number, else int64 of the same shape.

    Raises:
        ValueError: A probability lies outside [0, 1].
    """
    if isinstance(ratio, Tensor):
        return torch.tensor([to_q32(float(p)) for p in ratio.reshape(-1)], dtype=torch.int64).reshape(ratio.shape)
    if isinstance(ratio, Sequence):
        return torch.tensor([to_q32(float(p)) for p in ratio], dtype=torch.int64)
    if not 0 <= ratio <= 1:
        raise ValueError(f"to_q32: ratio must be in [0, 1], got {ratio}.")
    return round(Fraction(ratio) * WORD)


def sample_active(
    strata: Tensor,
    ratio: Tensor | Sequence[int] | None = None,
    *,
    hidden: Tensor | None = None,
    num_strata: int | None = None,
    grid: tuple[int, int],
    seed: int,
    ids: Tensor | Sequence[int],
    epoch: int,
    view: int = 0,
    weights: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Hide patches at random, stratum by stratum, with exact counts; a pure function of its arguments.

    A stratum of n patches with ratio p hides floor(n * p), plus one if the Philox word of (image, stratum) is less than
    2³² * frac(n * p). Hidden are the patches with the lowest keys, ties by the lower index. The key of a patch is word i of
    ``random_words(seed, ids, epoch, view, 0, L)``. With weights it is floor(E * 2¹⁶ / w) for E = -log2(u) in Q32 of a 64-bit u:
    the exponential race of Efraimidis and Spirakis (2006), in integers. No float takes part, so that masks are equal to
    the bit on every backend and independent of batch, workers, world size and device.

    Args:
        strata: Stratum of each patch, in [0, S), row-major on the grid. Any integer dtype or bool [B, L]
        ratio: Probability of being hidden for each stratum, as Q32 integers (`to_q32`). int64 [S] or [B, S]
        hidden: Instead of `ratio`: how many patches to hide in each stratum. Integer [S] or [B, S]
        num_strata: S; checked against `ratio` or `hidden` where given.
        grid: (Gh, Gw) with Gh * Gw = L.
        seed: In [0, 2⁶⁴).
        ids: One integer in [0, 2³²) per image. [B]
        epoch: In [0, 2³²).
        view: Number of the view of the image, in [0, 2¹⁶).
        weights: Order inside a stratum: the larger, the sooner hidden. Float in [0, 1], quantised to round(65535 * w) but
            at least 1 where positive, or integers in [0, 65535]. Weight zero is hidden last. Counts stay exact; the
            per-patch probabilities are those of drawing one by one without replacement. [B, L]
        backend: Forces an implementation; None picks the best.

    Returns:
        True where visible. bool [B, Gh, Gw]

    Raises:
        TypeError: An argument has the wrong dtype.
        ValueError: A shape or a range does not fit; ranges of tensors on a GPU are device-side assertions.
        BackendError: `backend` cannot run this input; the message lists the reasons.
    """
    rows, columns = grid
    if strata.dim() != 2 or strata.shape[1] != rows * columns or strata.shape[1] > MAX_PATCHES:
        raise ValueError(
            f"sample_active: strata must be [B, L] with L = {rows} * {columns} patches of the grid (at most 2**20), got {list(strata.shape)}."
        )
    if strata.is_floating_point():
        raise TypeError(f"sample_active: strata must be integers, got {strata.dtype}.")
    batch = strata.shape[0]
    ids = check_ids("sample_active", ids).to(strata.device, non_blocking=True)
    if ids.shape[0] != batch:
        raise ValueError(f"sample_active: ids must be [B] with B = {batch} (the images of strata), got {list(ids.shape)}.")
    seed = check_counters("sample_active", seed, epoch, view)
    amounts = _amounts(strata, ratio, hidden, num_strata)
    if weights is not None:
        weights = _quantise_weights(weights, strata)
    return _sample_active(
        strata, amounts, hidden is not None, rows, columns, seed, ids, epoch, view, weights, backend or ""
    )


def _amounts(strata: Tensor, ratio: Tensor | Sequence[int] | None, hidden: Tensor | None, num_strata: int | None) -> Tensor:
    """The Q32 ratios or the exact counts as int64 [S] or [B, S]."""
    if (ratio is None) == (hidden is None):
        raise ValueError("sample_active: give either ratio (Q32 probabilities) or hidden (exact counts), not both and not neither.")
    name, value = ("ratio", ratio) if hidden is None else ("hidden", hidden)
    if not isinstance(value, Tensor):
        value = torch.tensor(value)
    if value.is_floating_point():
        raise TypeError(f"sample_active: {name} must be integers, got {value.dtype}. Turn probabilities into Q32 with to_q32.")
    if value.dim() not in (1, 2) or (value.dim() == 2 and value.shape[0] != strata.shape[0]):
        raise ValueError(f"sample_active: {name} must be [S] or [B, S] with B = {strata.shape[0]}, got {list(value.shape)}.")
    if num_strata is not None and value.shape[-1] != num_strata:
        raise ValueError(f"sample_active: {name} must have S = {num_strata} strata in its last dimension, got {list(value.shape)}.")
    return value.to(torch.int64).to(strata.device, non_blocking=True)


def _quantise_weights(weights: Tensor, strata: Tensor) -> Tensor:
    """Weights as integers in [0, 65535]: the only place where a float becomes a weight, the same for all backends."""
    if weights.shape != strata.shape:
        raise ValueError(f"sample_active: weights must be [B, L] = {list(strata.shape)} like strata, got {list(weights.shape)}.")
    if not weights.is_floating_point():
        quantised = weights.to(torch.int64)
        _require((quantised >= 0) & (quantised <= _WEIGHT_ONE), "sample_active: integer weights must be in [0, 65535]. Scale them.")
        return quantised
    wide = weights.detach().double()
    _require((wide >= 0) & (wide <= 1), "sample_active: weights must be in [0, 1] and not NaN. Divide them by their maximum.")
    return torch.round(wide * _WEIGHT_ONE).to(torch.int64).clamp(min=0).maximum((wide > 0).to(torch.int64))


def _require(good: Tensor, message: str) -> None:
    """ValueError, or on a GPU, where a look from the host would wait for the device, a device-side assertion."""
    if good.device.type == "cuda":
        torch._assert_async(good.all(), message)
    elif not bool(good.all()):
        raise ValueError(message)


def _log2_table(device: torch.device) -> Tensor:
    """2³² * log2(1 + i / 256), LOG2_TABLE on the device. int64 [257]"""
    if device.type == "cpu":
        return _log2_on_host()
    # What one graph capture or stream makes must not be read by another before it is there, and a copy from the host would wait.
    if torch.cuda.is_current_stream_capturing():
        return _log2_computed(device)
    return _log2_on_stream(device, gpu.stream_on(device))


@functools.cache
def _log2_on_host() -> Tensor:
    return torch.tensor(LOG2_TABLE, dtype=torch.int64)


@functools.cache
def _log2_on_stream(device: torch.device, stream: int) -> Tensor:
    return _log2_computed(device)


def _log2_computed(device: torch.device) -> Tensor:
    """No entry lies nearer than 7e-4 to where rounding turns, and float64 is off by 1e-6 at most: the integers are those of the table."""
    return torch.arange(257, device=device, dtype=torch.float64).div_(256).add_(1).log2_().mul_(WORD).round_().to(torch.int64)


def _implementation(
    strata: Tensor,
    amounts: Tensor,
    exact: bool,
    rows: int,
    columns: int,
    seed: int,
    ids: Tensor,
    epoch: int,
    view: int,
    weights: Tensor | None,
    backend: str,
) -> Tensor:
    active = strata.new_empty((strata.shape[0], rows, columns), dtype=torch.bool)
    name = resolve("sample_active", backend, strata)
    if name == "reference":
        if not exact and amounts.numel() and (int(amounts.min()) < 0 or int(amounts.max()) > WORD):
            raise ValueError("sample_active: ratio must be Q32 integers in [0, 2**32]. Use to_q32.")
        spread = amounts.expand(strata.shape[0], amounts.shape[-1])
        chosen = reference.sample_active(strata.to(torch.int64), spread, exact, seed, ids, epoch, view, weights)
        return active.copy_(chosen.reshape(active.shape))
    if name == "triton":
        with gpu.guard(strata):
            gpu.triton_kernels("sample_active").sample_active(
                gpu.as_bytes(strata), amounts, exact, seed, ids, epoch, view, weights, _log2_table(strata.device), gpu.as_bytes(active)
            )
        return active
    arguments = (
        *(native.view(strata), native.view(amounts), exact, seed, native.view(ids), epoch, view),
        *(native.view(weights), native.view(active)),
    )
    if name == "cuda":
        with gpu.guard(strata):
            gpu.cuda().sample_active(*arguments, *gpu.launch(strata))
    else:
        native.core().sample_active(*arguments, native.threads())
    return active


def _fake(
    strata: Tensor,
    amounts: Tensor,
    exact: bool,
    rows: int,
    columns: int,
    seed: int,
    ids: Tensor,
    epoch: int,
    view: int,
    weights: Tensor | None,
    backend: str,
) -> Tensor:
    return strata.new_empty((strata.shape[0], rows, columns), dtype=torch.bool)


_sample_active = register(
    "sample_active",
    "(Tensor strata, Tensor amounts, bool exact, SymInt rows, SymInt columns, SymInt seed, Tensor ids, SymInt epoch, SymInt view,"
    " Tensor? weights, str backend) -> Tensor",
    _implementation,
    _fake,
)
