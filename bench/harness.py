"""One way to measure for every bench: check first, then read the sides in turn, and quote medians of pairs.

The machines this runs on are shared and noisy, so a time alone means little: the sides are read alternately in one process
and the score is taken pair by pair. A side whose result differs from the rival's is not timed at all.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from mwm.bench.rows import Row

Step = Callable[[], object]
Reading = Callable[[], float]

_SHORTEST = 4e-3  # seconds of one timed stretch; shorter steps are repeated until they fill it


class WrongResult(RuntimeError):
    """The two sides of a match do not compute the same thing."""


@dataclass(frozen=True)
class Check:
    """How far two results lie apart, and how far they may: 0 <= difference <= tolerance."""

    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class Limit:
    """What bounds a step on this machine.

    Attributes:
        amount: arithmetic or traffic that one of our steps needs at least, GFLOP or GB.
        rate: reads the rate of this machine, GFLOP/s or GB/s; read in every pair, since a shared machine changes its pace.
        unit: of the rate.
        words: how it is measured.
    """

    amount: float
    rate: Reading
    unit: str
    words: str


@dataclass
class Match:
    """Our side and its rivals, ready to run.

    Attributes:
        ours: reads our side once: a time, a size or a rate (`timed` makes a reading of a step).
        rivals: the same for each rival.
        checks: for each rival, how its result compares with ours; a rival without a check is refused.
        unit: of the readings.
        score_is: what is quoted, see `Row`.
        warmup: readings of every side that are thrown away first.
    """

    ours: Reading
    rivals: dict[str, Reading]
    checks: dict[str, Check]
    unit: str = "ms"
    score_is: str = "rival / ours"
    visible: float | None = None
    limit: Limit | None = None
    warmup: int = 2
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A named match of a bench; `prepare` builds both sides and compares them.

    Attributes:
        pairs: interleaved pairs by default.
        extra: no bar depends on it; `mwm bench all` runs it after the others, so that a run that is cut has what counts.
    """

    bench: str
    name: str
    prepare: Callable[[], Match]
    pairs: int = 7
    extra: bool = False


def refuse_wrong(case: Case, match: Match) -> None:
    """Raise WrongResult where a side differs from ours by more than its check allows, or was not checked."""
    for rival in match.rivals:
        check = match.checks.get(rival)
        if check is None:
            raise WrongResult(f"bench {case.bench}: {case.name}: ours was not compared with {rival}; not timing an unchecked result.")
        if not check.passed:
            raise WrongResult(f"bench {case.bench}: {case.name}: ours differs from {rival} by {check.difference:.1e}, allowed are {check.tolerance:.1e}; "
                              "not timing a wrong result.")


def measure(case: Case, pairs: int | None = None) -> list[Row]:
    """Check one case, then read ours and each rival in turn: ours, rival, rival …, ours, …

    Returns:
        One row per rival.

    Raises:
        WrongResult: the sides do not agree; nothing was timed.
    """
    match = case.prepare()
    refuse_wrong(case, match)
    others = other_sides(match)
    for reading in [match.ours, *others.values()]:
        for _ in range(match.warmup):
            reading()
    mine: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(case.pairs if pairs is None else pairs):
        mine.append(match.ours())
        for name, reading in others.items():
            theirs[name].append(reading())
    return rows_of(case, match, mine, theirs)


_LIMIT = "the machine's limit"


def other_sides(match: Match) -> dict[str, Reading]:
    """What is read in every pair besides our side: the rivals, and the machine's limit where the match has one."""
    return match.rivals | ({_LIMIT: match.limit.rate} if match.limit else {})


def rows_of(case: Case, match: Match, mine: Sequence[float], theirs: dict[str, Sequence[float]]) -> list[Row]:
    """Rows from readings of our side and of `other_sides` that were taken in pairs."""
    ours = statistics.median(mine)
    percent, limit = None, ""
    if match.limit is not None:
        rates = theirs[_LIMIT]
        percent = statistics.median(100 * match.limit.amount / (1e-3 * a) / rate for a, rate in zip(mine, rates, strict=True))
        limit = f"{statistics.median(rates):.0f} {match.limit.unit} ({match.limit.words})"
    rows = []
    for name in match.rivals:
        readings = theirs[name]
        scores = sorted(_score(a, b, match.score_is) for a, b in zip(mine, readings, strict=True))
        check = match.checks[name]
        rows.append(Row(case.bench, case.name, name, match.unit, ours, statistics.median(readings), statistics.median(scores), scores[len(scores) // 4],
                        scores[-1 - len(scores) // 4], match.score_is, len(mine), check.difference, check.tolerance, match.visible, percent,
                        limit, match.notes.get(name, match.notes.get("", ""))).judged())
    return rows


def _score(ours: float, rival: float, score_is: str) -> float:
    if score_is == "rival / ours":
        return rival / ours if ours else math.inf
    share = ours / rival if rival else math.inf
    return share if score_is == "ours / rival" else 100 * share


def timed(step: Step) -> Reading:
    """A reading of a step's wall time in milliseconds; very short steps are repeated, and the mean is read."""
    repeats = 0

    def read() -> float:
        nonlocal repeats
        if not repeats:
            step()  # the first call allocates and loads
            repeats = max(1, min(200, math.ceil(_SHORTEST / max(seconds(step), 1e-7))))
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return 1e3 * (time.perf_counter() - start) / repeats

    return read


def seconds(step: Step) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def relative_difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """‖ours − reference‖ / ‖reference‖ in float64."""
    reference = reference.detach().double()
    return float((ours.detach().double() - reference).norm() / reference.norm().clamp_min(1e-30))


def worst_difference(ours: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """The largest `relative_difference` of two lists of tensors; NaN where one is."""
    differences = [relative_difference(a, b) for a, b in zip(ours, reference, strict=True)]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def joint_difference(ours: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """`relative_difference` of two lists of tensors, each taken as one long vector."""
    return relative_difference(torch.cat([t.detach().double().flatten() for t in ours]), torch.cat([t.detach().double().flatten() for t in reference]))
