"""The one comparison that every op test uses: value and gradients against a float64 oracle.

An op is right when its error against the oracle in float64 is at most twice (gradients: three times) that of torch's dense op
on the masked input in the same dtype, both as ||y - y64|| / ||y64|| and as the largest difference, with a floor of one unit in
the last place. In exact mode the inputs are small integers, sums stay exact in any order, and values must be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
BACKWARD_FACTOR = 3.0

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Finding:
    """One compared quantity.

    Attributes:
        name: "value" or "gradient 0", "gradient 1", …
        error, allowed: ||y - y64|| / ||y64|| and its limit.
        largest, largest_allowed: max |y - y64| and its limit.
    """

    name: str
    error: float
    allowed: float
    largest: float
    largest_allowed: float

    @property
    def good(self) -> bool:
        """False also where an error is NaN."""
        return self.error <= self.allowed and self.largest <= self.largest_allowed


def check(
    op: Function,
    oracle: Function,
    inputs: Sequence[Tensor | None],
    *,
    dtype: torch.dtype = torch.float32,
    exact: bool = False,
    threads: Sequence[int] = (1, 2),
    gradients: bool = True,
) -> list[Finding]:
    """Compare `op` with `oracle` in value and gradients; raise AssertionError with the numbers where it is wrong.

    Args:
        op: Called with the inputs in `dtype`.
        oracle: The same function in dense torch; called in float64 for the truth and in `dtype` as the rival.
        inputs: float64 tensors, rounded to `dtype` first; None and integer tensors are passed on.
        dtype: Dtype of the comparison.
        exact: The inputs are small integers; demand equality.
        threads: The results must be bitwise equal for these numbers of threads and on repetition.
        gradients: Compare the gradients of all floating inputs too.

    Returns:
        What was compared.
    """
    rounded = [_cast(x, dtype) for x in inputs]
    truth_in = [_cast(x, torch.float64) for x in rounded]
    with torch.no_grad():
        shape = oracle(*truth_in).shape
    generator = torch.Generator().manual_seed(7)
    grad = integers(shape, generator) if exact else torch.randn(shape, generator=generator, dtype=torch.float64)
    grad = grad.to(dtype)
    truth = _run(oracle, truth_in, grad, gradients)
    results = [_with_threads(n, op, rounded, grad, gradients) for n in (*threads, threads[0])]
    for n, other in zip((*threads, threads[0])[1:], results[1:], strict=True):
        for name, first, second in zip(_names(results[0]), results[0], other, strict=True):
            if not _same_bits(first, second):
                raise AssertionError(f"{name}: not bitwise equal between {threads[0]} and {n} threads, or on repetition")
    ours = results[0]
    rival = None if exact else _run(oracle, rounded, grad, gradients)
    findings = []
    for i, name in enumerate(_names(ours)):
        if ours[i].shape != truth[i].shape:
            raise AssertionError(f"{name}: has shape {list(ours[i].shape)}, the oracle's is {list(truth[i].shape)}")
        factor = FORWARD_FACTOR if i == 0 else BACKWARD_FACTOR
        findings.append(_find(name, ours[i], truth[i], None if rival is None else rival[i], factor))
    bad = [finding for finding in findings if not finding.good]
    if bad:
        raise AssertionError("\n".join(map(str, bad)))
    return findings


def _find(name: str, ours: Tensor, truth: Tensor, rival: Tensor | None, factor: float) -> Finding:
    error, largest = _errors(ours, truth)
    if rival is None:
        return Finding(name, error, 0.0, largest, 0.0)
    # In float64 the truth itself is rounded, so that the rival's distance from it says nothing.
    epsilon = torch.finfo(ours.dtype).eps * (32 if ours.dtype == torch.float64 else 1)
    top = float(truth.abs().max()) if truth.numel() else 0.0
    rival_error, rival_largest = _errors(rival, truth)
    return Finding(name, error, max(factor * rival_error, epsilon), largest, max(factor * rival_largest, epsilon * top))


def _errors(y: Tensor, truth: Tensor) -> tuple[float, float]:
    if y.numel() == 0:
        return 0.0, 0.0
    difference = y.double() - truth
    scale = float(truth.norm())
    return float(difference.norm()) / scale if scale else float(difference.norm()), float(difference.abs().max())


def _run(function: Function, inputs: Sequence[Tensor | None], grad: Tensor, gradients: bool) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_(gradients) if _floating(x) else x for x in inputs]
    out = function(*leaves)
    wanted = [x for x in leaves if _floating(x)]
    if not gradients:
        return [out.detach()]
    found = torch.autograd.grad(out, wanted, grad.to(out), allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True))]


def _with_threads(count: int, function: Function, inputs: Sequence[Tensor | None], grad: Tensor, gradients: bool) -> list[Tensor]:
    with num_threads(count):
        return _run(function, inputs, grad, gradients)


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """torch.set_num_threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _names(results: Sequence[Tensor]) -> list[str]:
    return ["value", *(f"gradient {i}" for i in range(len(results) - 1))]


def _floating(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point()


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x.detach().to(dtype) if _floating(x) else x


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.nan_to_num(12345.0), second.nan_to_num(12345.0))


def integers(shape: Sequence[int], generator: torch.Generator, *, limit: int = 2, density: float = 0.3) -> Tensor:
    """Small integers, mostly zero, as float64: sums of their products are exact in any order and in any dtype of ours."""
    values = torch.randint(-limit, limit + 1, tuple(shape), generator=generator).double()
    return values * (torch.rand(tuple(shape), generator=generator) < density)


def normals(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal float64."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def masks(generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Masks that find index errors: bool [B, Gh, Gw] by name; grids are not square unless the name says so."""
    generator = generator or torch.Generator().manual_seed(3)
    mixed = torch.rand((4, 3, 5), generator=generator) < 0.4
    mixed[1] = False  # an image without a visible patch
    mixed[2] = True
    single = torch.zeros((2, 4, 3), dtype=torch.bool)
    single[1, 2, 1] = True
    checker = (torch.arange(4)[:, None] + torch.arange(6)) % 2 == 0
    return {
        "mixed": mixed,
        "single tile": single,
        "checkerboard": checker.expand(2, 4, 6).clone(),
        "all visible": torch.ones((2, 2, 3), dtype=torch.bool),
        "all hidden": torch.zeros((2, 3, 2), dtype=torch.bool),
        "no image": torch.zeros((0, 3, 2), dtype=torch.bool),
        "one patch": torch.ones((3, 1, 1), dtype=torch.bool),
        "square 7": torch.rand((3, 7, 7), generator=generator) < 0.4,
    }
