"""Inference over patients: estimates with intervals, paired contrasts of two arms, Holm's correction, what could have been detected.

The unit is the patient (or the block, where patients are not published). Patients are drawn with replacement; in a contrast both arms see the same drawn
patients, so that what is hard for both cancels. The models are fixed: intervals speak about new patients, not about new seeds, whose spread is shown
apart (`fold_values`).

A percentile interval of few clusters is too narrow: it lacks the factor sqrt(n / (n - 1)) and the step from the normal to Student's t. Both are put
back by widening the tail probability (Hesterberg, "What teachers should know about the bootstrap", 2015, "expanded percentile interval"); with 29
patients 2.5 % becomes 1.9 %. The p value is the level at which that interval would just exclude zero, so that p < 0.05 and an interval without zero are the same,
up to one draw.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from mwm.study.endpoints import Answers, Statistic, fold_values, statistic
from mwm.study.errors import StudyError

ROUNDS = 10_000
_BLOCK = 2_000


@dataclass(frozen=True)
class Estimate:
    """One number with what it rests on.

    Attributes:
        value, low, high: Endpoint and 95 % interval.
        images, patients, folds: Numbers.
        spread: Lowest and highest value of a single fold.
    """

    value: float
    low: float
    high: float
    images: int
    patients: int
    folds: int
    spread: tuple[float, float]


@dataclass(frozen=True)
class Contrast:
    """First arm minus second arm.

    Attributes:
        difference, low, high: Paired difference and its 95 % interval.
        p: Two-sided.
        error: Standard deviation of the bootstrap differences, sqrt(n / (n - 1)) included.
        detectable: Smallest true difference that a test at 5 % would find in 80 % of such studies.
        images, patients, folds: Numbers.
        by_fold: Difference of each shared fold.
    """

    difference: float
    low: float
    high: float
    p: float
    error: float
    detectable: float
    images: int
    patients: int
    folds: int
    by_fold: dict[int, float]


@functools.lru_cache(maxsize=2)
def draws(patients: int, *, rounds: int = ROUNDS, seed: int = 0) -> NDArray:
    """How often each patient is drawn; depends on nothing but the arguments, so that all arms see the same draws. uint8, uint16 or int32 [R, P]"""
    generator, chances = np.random.default_rng([seed, patients]), np.full(patients, 1 / patients)
    counts = np.empty((rounds, patients), dtype=np.uint8 if patients < 2**8 else np.uint16 if patients < 2**16 else np.int32)
    for k in range(0, rounds, _BLOCK):  # numpy's eight bytes a count would take most of a gigabyte for ten thousand patients
        counts[k : k + _BLOCK] = generator.multinomial(patients, chances, size=min(_BLOCK, rounds - k))
    counts.flags.writeable = False  # shared by all callers
    return counts


def expanded(level: float, patients: int) -> float:
    """Tail probability whose percentile gives the two-sided interval of `level` (0.05 = 95 %) with this many patients."""
    return float(norm.cdf(math.sqrt(patients / (patients - 1)) * t.ppf(level / 2, patients - 1)))


def estimate(answers: Answers, endpoint: str, *, rounds: int = ROUNDS, seed: int = 0) -> Estimate:
    """An endpoint of one arm with its interval over patients.

    Args:
        answers: Out-of-fold answers.
        endpoint: As in `endpoints.statistic`.
        rounds: Bootstrap draws.
        seed: Of the draws.

    Returns:
        The estimate; of a single patient without an interval (NaN).
    """
    return estimate_of(statistic(answers, endpoint), patients=len(answers.patients), images=len(answers.file), by_fold=fold_values(answers, endpoint), rounds=rounds, seed=seed)


def estimate_of(of: Statistic, *, patients: int, images: int, by_fold: dict[int, float], rounds: int = ROUNDS, seed: int = 0) -> Estimate:
    """`estimate` for a statistic that is given as a function of the patients' counts, such as AP."""
    value = float(of(np.ones((1, patients)))[0])
    sample = _sample(of, patients, rounds, seed)
    tail = expanded(0.05, patients) if len(sample) else 0.0
    low, high = np.quantile(sample, (tail, 1 - tail)) if len(sample) else (math.nan, math.nan)
    each = [value for value in by_fold.values() if math.isfinite(value)] or [math.nan]
    return Estimate(value, float(low), float(high), images, patients, len(by_fold), (min(each), max(each)))


def contrast(first: Answers, second: Answers, endpoint: str, *, rounds: int = ROUNDS, seed: int = 0) -> Contrast:
    """Paired difference of two arms, over the patients of the folds that both have.

    Args:
        first, second: Out-of-fold answers of the arms.
        endpoint: As in `endpoints.statistic`.
        rounds: Bootstrap draws.
        seed: Of the draws.

    Raises:
        StudyError: no fold in common, or a fold in which the arms answer different images or other truths.
    """
    first, second = paired(first, second)
    one, other = statistic(first, endpoint), statistic(second, endpoint)
    return compare(one, other, patients=len(first.patients), images=len(first.file), rounds=rounds, seed=seed,
                   by_fold={fold: value - fold_values(second, endpoint)[fold] for fold, value in fold_values(first, endpoint).items()})


def compare(one: Statistic, other: Statistic, *, patients: int, images: int, by_fold: dict[int, float], rounds: int = ROUNDS, seed: int = 0) -> Contrast:
    """`contrast` for statistics that are given as functions of the patients' counts, such as AP."""
    ones = np.ones((1, patients))
    difference = float(one(ones)[0] - other(ones)[0])
    sample = _sample(lambda counts: one(counts) - other(counts), patients, rounds, seed)
    if not len(sample) or not math.isfinite(difference):
        return Contrast(difference, math.nan, math.nan, math.nan, math.nan, math.nan, images, patients, len(by_fold), by_fold)
    tail = expanded(0.05, patients)
    low, high = np.quantile(sample, (tail, 1 - tail))
    error = float(sample.std()) * math.sqrt(patients / (patients - 1))
    detectable = error * float(t.ppf(0.975, patients - 1) + t.ppf(0.8, patients - 1))
    return Contrast(difference, float(low), float(high), _p_value(sample, patients), error, detectable, images, patients, len(by_fold), by_fold)


def paired(first: Answers, second: Answers) -> tuple[Answers, Answers]:
    """Both arms on the folds that both have, rows in one order.

    Raises:
        StudyError: no fold in common, or a fold in which the arms answer different images or other truths.
    """
    shared = sorted(set(first.fold.tolist()) & set(second.fold.tolist()))
    if not shared:
        raise StudyError("contrast: both arms must have a finished fold in common, got none. Finish the cells of one fold in both arms.")
    sides = []
    for arm in (first, second):
        rows = [k for k in range(len(arm.file)) if arm.fold[k] in shared]
        sides.append(arm.take(sorted(rows, key=lambda k: (arm.fold[k], arm.file[k]))))
    a, b = sides
    if a.file != b.file or a.patient != b.patient or (a.fold != b.fold).any() or not np.array_equal(a.truth, b.truth):
        differ = len(set(a.file) ^ set(b.file))
        raise StudyError(f"contrast: both arms must answer the same images of each shared fold, with the same patients and labels, got {differ} images of one arm only. "
                         "Collect both arms from one study.")
    return a, b


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values; NaN (a contrast that could not be tested) stays NaN and does not count.

    Sorted p(1) <= … <= p(m): adjusted(i) = max over j <= i of min(1, (m - j + 1) p(j)).
    """
    values = np.asarray(p, dtype=np.float64)
    result = np.full(len(values), np.nan)
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    result[order] = np.maximum.accumulate(np.minimum(1.0, factors * values[order])) if len(order) else []
    return result.tolist()


def _sample(of: Statistic, patients: int, rounds: int, seed: int) -> NDArray:
    """Endpoint of each draw; draws in which it is not defined are left out. float64 [<= R]"""
    if patients < 2:  # the first fold of a small study may hold one; there is nothing to draw from
        return np.zeros(0)
    counts = draws(patients, rounds=rounds, seed=seed)
    values = np.concatenate([of(counts[k : k + _BLOCK]) for k in range(0, rounds, _BLOCK)])
    return values[np.isfinite(values)]


def _p_value(sample: NDArray, patients: int) -> float:
    """Level at which the expanded percentile interval ends at zero; at least that of one draw in all."""
    # Draws of exactly zero count to both sides, as they do for an interval that ends at zero.
    tail = (min((sample <= 0).sum(), (sample >= 0).sum()) + 1) / (len(sample) + 1)
    if tail >= 0.5:
        return 1.0
    return float(min(1.0, 2 * t.cdf(norm.ppf(tail) / math.sqrt(patients / (patients - 1)), patients - 1)))
