"""Endpoints equal independent implementations, intervals cover a known truth, p values hold their level, Holm equals the hand computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, norm
from sklearn import metrics as sk

from mwm.study.endpoints import Answers, fold_values, statistic
from mwm.study.errors import StudyError
from mwm.study.statistics import contrast, draws, estimate, expanded, holm
from mwm.transfer.metrics import auroc, balanced_accuracy, macro_f1


def _answers(seed: int, *, classes: int = 3, patients: int = 15, folds: int = 3, shift: float = 0.0) -> Answers:
    generator = np.random.default_rng(seed)
    rows = [(f"{p}_{k}", p % folds, f"p{p}", int(generator.integers(classes))) for p in range(patients) for k in range(generator.integers(2, 7))]
    truth = np.array([row[3] for row in rows])
    scores = np.round(8 * generator.standard_normal((len(rows), classes))) / 8 + 0.75 * np.eye(classes)[truth]
    scores += shift * np.array([row[1] for row in rows])[:, None]
    return Answers(tuple(r[0] for r in rows), np.array([r[1] for r in rows]), tuple(r[2] for r in rows), truth, scores)


def _repeated(answers: Answers, counts: np.ndarray) -> Answers:
    """The draw written out: every row as often as its patient was drawn."""
    rows = np.repeat(np.arange(len(answers.file)), counts[answers.owners()])
    drawn = answers.take(np.unique(rows))
    return Answers(tuple(str(k) for k in range(len(rows))), answers.fold[rows], tuple(answers.patient[k] for k in rows), answers.truth[rows],
                   answers.scores[rows]) if len(rows) else drawn


def _pairs_by_hand(answers: Answers, kind: int) -> float:
    wins = pairs = 0.0
    for i in range(len(answers.file)):
        for j in range(len(answers.file)):
            if answers.fold[i] == answers.fold[j] and answers.truth[i] == kind != answers.truth[j]:
                pairs += 1
                wins += float(answers.scores[i, kind] > answers.scores[j, kind]) + 0.5 * float(answers.scores[i, kind] == answers.scores[j, kind])
    return wins / pairs


@pytest.mark.parametrize("classes", [2, 3])
def test_auroc_is_the_share_of_pairs_within_a_fold(classes: int) -> None:
    answers = _answers(0, classes=classes)
    kinds = [1] if classes == 2 else range(classes)
    value = statistic(answers, "auroc")(np.ones(15))[0]
    assert value == pytest.approx(np.mean([_pairs_by_hand(answers, kind) for kind in kinds]))
    one = answers.take(np.flatnonzero(answers.fold == 0))
    scores = one.scores - one.scores.min()
    assert fold_values(answers, "auroc")[0] == pytest.approx(auroc(one.truth, scores)) == pytest.approx(
        sk.roc_auc_score(one.truth, one.scores[:, 1]) if classes == 2 else np.mean([sk.roc_auc_score(one.truth == k, one.scores[:, k]) for k in kinds]))


def test_auroc_ignores_the_scale_of_each_folds_model() -> None:
    plain, shifted = _answers(1), _answers(1, shift=5.0)
    of, of_shifted = statistic(plain, "auroc"), statistic(shifted, "auroc")
    counts = draws(15, rounds=20, seed=1)
    np.testing.assert_allclose(of(counts), of_shifted(counts))
    assert abs(auroc(plain.truth, plain.scores) - auroc(shifted.truth, shifted.scores)) > 0.02


@pytest.mark.parametrize(("endpoint", "independent"), [
    ("accuracy", lambda a: sk.accuracy_score(a.truth, a.scores.argmax(1))),
    ("balanced_accuracy", lambda a: balanced_accuracy(a.truth, a.scores)),
    ("macro_f1", lambda a: macro_f1(a.truth, a.scores)),
    ("auroc", lambda a: float(np.nanmean([_pairs_by_hand(a, kind) for kind in range(3)]))),
])
def test_weighted_endpoints_equal_the_written_out_draw(endpoint: str, independent) -> None:
    answers = _answers(2)
    counts = draws(15, rounds=6, seed=3)
    values = statistic(answers, endpoint)(counts)
    for row, value in zip(counts, values, strict=True):
        assert value == pytest.approx(independent(_repeated(answers, row)))


def test_mean_endpoint_leaves_out_what_is_not_defined() -> None:
    answers = Answers(("a", "b", "c"), np.array([0, 0, 1]), ("p", "p", "q"), np.zeros(0, dtype=int), np.array([0.2, math.nan, 0.8]))
    np.testing.assert_allclose(statistic(answers, "dice")(np.array([[1, 1], [3, 1], [0, 0]])), [0.5, 1.4 / 4, math.nan])


def test_holm_equals_the_hand_computation() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    mixed = holm([0.02, math.nan, 0.02])
    assert mixed[0] == mixed[2] == pytest.approx(0.04) and math.isnan(mixed[1]) and holm([]) == []


def test_equal_arms_do_not_differ() -> None:
    answers = _answers(4)
    result = contrast(answers, answers, "auroc", rounds=200)
    assert (result.difference, result.low, result.high, result.p) == (0, 0, 0, 1)


def _means(generator: np.random.Generator, patients: int, effect: float) -> tuple[Answers, Answers]:
    """Two arms' Dice with patient effects that are shared in part; the true difference is `effect`."""
    number = generator.integers(3, 30, patients)
    owner = np.repeat(np.arange(patients), number)
    shared, own = generator.normal(0, 0.1, patients), generator.normal(0, 0.05, (2, patients))
    noise = generator.normal(0, 0.1, (2, len(owner)))
    names = tuple(map(str, range(len(owner)))), owner % 5, tuple(f"p{k}" for k in owner), np.zeros(0, dtype=int)
    first, second = (Answers(*names, 0.6 + shared[owner] + own[k][owner] + noise[k] + (effect if k == 0 else 0)) for k in (0, 1))
    return first, second


def test_intervals_cover_the_true_difference_as_often_as_they_claim() -> None:
    generator, runs = np.random.default_rng(0), 250
    covered = level = 0
    for _ in range(runs):
        result = contrast(*_means(generator, 29, 0.03), "dice", rounds=400)
        covered += result.low <= 0.03 <= result.high
        level += contrast(*_means(generator, 29, 0.0), "dice", rounds=400).p < 0.05
    low, high = binom.ppf([0.001, 0.999], runs, 0.95)
    assert low <= covered <= high
    assert runs - high <= level <= runs - low


def test_auroc_intervals_cover_the_population_value_with_as_few_blocks_as_brain_mri_has() -> None:
    generator, runs, covered, level = np.random.default_rng(1), 120, 0, 0
    true = norm.cdf(1 / np.sqrt(2 * (0.5**2 + 1)))
    for _ in range(runs):
        owner = np.repeat(np.arange(29), generator.integers(5, 20, 29))
        truth = np.repeat([0, 1, 2], [13, 6, 10])[owner]
        names = tuple(map(str, range(len(owner)))), owner % 5, tuple(f"p{k}" for k in owner), truth
        effect, noise = generator.normal(0, 0.5, (2, 29, 3)), generator.normal(0, 1, (2, len(owner), 3))
        arms = [Answers(*names, np.eye(3)[truth] + effect[k][owner] + noise[k] + 3 * k * names[1][:, None]) for k in (0, 1)]
        found = estimate(arms[1], "auroc", rounds=300)
        covered += found.low <= true <= found.high
        level += contrast(*arms, "auroc", rounds=300).p < 0.05
    assert covered >= binom.ppf(0.001, runs, 0.95)
    assert level <= binom.ppf(0.999, runs, 0.05)


def test_the_detectable_difference_is_found_in_four_of_five_studies() -> None:
    generator, runs = np.random.default_rng(2), 150
    size = np.mean([contrast(*_means(generator, 40, 0.0), "dice", rounds=300).detectable for _ in range(30)])
    found = sum(contrast(*_means(generator, 40, size), "dice", rounds=300).p < 0.05 for _ in range(runs))
    assert 0.68 <= found / runs <= 0.92


def test_p_below_five_percent_means_an_interval_without_zero() -> None:
    generator = np.random.default_rng(3)
    for effect in np.linspace(0, 0.06, 25):
        result = contrast(*_means(generator, 20, effect), "dice", rounds=4000)
        if abs(result.p - 0.05) > 0.004:
            assert (result.p < 0.05) == (result.low > 0 or result.high < 0)
    assert expanded(0.05, 10**6) == pytest.approx(0.025, abs=1e-5) and expanded(0.05, 29) < 0.02


def test_contrasts_use_shared_folds_only_and_refuse_other_images() -> None:
    first, second = _answers(5), _answers(5)
    part = second.take(np.flatnonzero(second.fold != 2))
    result = contrast(first, part, "accuracy", rounds=100)
    assert result.folds == 2 and result.patients == 10 and set(result.by_fold) == {0, 1}
    with pytest.raises(StudyError, match="same images"):
        contrast(first, second.take(range(1, len(second.file))), "accuracy")
    with pytest.raises(StudyError, match="a finished fold in common"):
        contrast(first.take(np.flatnonzero(first.fold == 0)), part.take(np.flatnonzero(part.fold == 1)), "accuracy")
    with pytest.raises(ValueError, match="unique images"):
        Answers(("a", "a"), np.zeros(2), ("p", "q"), np.zeros(2, dtype=int), np.zeros((2, 2)))


def test_both_arms_see_the_same_patients_in_every_draw() -> None:
    assert (draws(12, rounds=50, seed=4) == draws(12, rounds=50, seed=4)).all() and (draws(12, rounds=50).sum(1) == 12).all()


def test_a_single_patient_has_an_estimate_and_no_interval() -> None:
    """The first fold of a small study may test one alone; its report had ended with an error."""
    one = _answers(5).take([0, 1])
    assert len(one.patients) == 1
    found, other = estimate(one, "accuracy"), contrast(one, one, "accuracy")
    assert np.isfinite(found.value) and np.isnan([found.low, found.high]).all()
    assert other.difference == 0 and np.isnan([other.low, other.high, other.p, other.detectable]).all()


def test_draws_are_those_of_one_call_in_less_memory() -> None:
    """Drawn in blocks; the numbers of studies that were run rest on them."""
    for patients, kind in ((29, np.uint8), (300, np.uint16)):
        whole = np.random.default_rng([0, patients]).multinomial(patients, np.full(patients, 1 / patients), size=4500)
        found = draws(patients, rounds=4500)
        assert (found == whole).all() and found.dtype == kind
