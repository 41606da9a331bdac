"""Shares of the labels: whole patients, nested, every class, and the same whatever else there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from mwm.data import Record
from mwm.transfer.fractions import keep_fraction
from mwm.transfer.labelled import Case


def cases(patients: int, *, classes: int = 3, images: int = 2, known: bool = True) -> list[Case]:
    return [Case(Record(Path(f"{p}_{k}"), f"{p}_{k}", p * images + k), p % classes, f"p{p}" if known else "", "train") for p in range(patients) for k in range(images)]


def patients(kept: list[Case]) -> set[str]:
    return {case.patient for case in kept}


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_nested_whole_patients_of_the_size_asked_for(seed: int) -> None:
    rows, before = cases(90), set()
    for fraction in (0.01, 0.1, 0.25, 0.5, 0.9, 1.0):
        kept = keep_fraction(rows, fraction, seed=seed)
        assert before <= patients(kept)
        assert len(kept) == 2 * len(patients(kept))
        assert all(sum(case.label == k for case in kept) == 2 * max(1, round(30 * fraction)) for k in range(3))
        before = patients(kept)
    assert before == patients(rows)


def test_a_draw_depends_on_seed_and_patients_not_on_order_or_others() -> None:
    rows = cases(60)
    kept = patients(keep_fraction(rows, 0.2, seed=3))
    assert patients(keep_fraction(rows[::-1], 0.2, seed=3)) == kept
    assert patients(keep_fraction(rows, 0.2, seed=4)) != kept
    fewer = [case for case in rows if case.patient in kept or int(case.patient[1:]) % 2]
    assert len(patients(keep_fraction(fewer, 0.2, seed=3)) - kept) == 0


def test_a_class_that_only_shared_patients_hold_is_never_lost_and_stays_nested() -> None:
    rows = cases(40, classes=2)
    rows += [Case(Record(Path(f"x{p}"), f"x{p}", 1000 + p), 2, f"p{p}", "train") for p in range(5)]  # second images of patients of other classes
    before = set()
    for fraction in (0.02, 0.1, 0.3, 0.6):
        kept = keep_fraction(rows, fraction, seed=0)
        assert {case.label for case in kept} == {0, 1, 2}
        assert before <= patients(kept)
        before = patients(kept)


def test_images_are_drawn_one_by_one_where_patients_are_not_known() -> None:
    kept = keep_fraction(cases(30, images=1, known=False), 0.2, seed=0)
    assert [sum(case.label == k for case in kept) for k in range(3)] == [2, 2, 2]
