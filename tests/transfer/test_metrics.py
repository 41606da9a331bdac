"""The figures agree with their definitions, and the intervals respect patients."""

from __future__ import annotations

import numpy as np
import pytest

from mwm.transfer import classification_metrics
from mwm.transfer.metrics import accuracy, auroc, balanced_accuracy, bootstrap, confusion, macro_f1


def one_hot(predicted: list[int], classes: int) -> np.ndarray:
    return np.eye(classes)[predicted]


def test_figures_equal_their_definitions_on_a_hand_made_case() -> None:
    truth = np.array([0, 0, 0, 1])
    answers = one_hot([0, 0, 1, 1], 2)
    assert accuracy(truth, answers) == 0.75
    assert balanced_accuracy(truth, answers) == pytest.approx((2 / 3 + 1) / 2)
    assert macro_f1(truth, answers) == pytest.approx((0.8 + 2 / 3) / 2)
    assert confusion(truth, answers).tolist() == [[2, 1], [0, 1]]


def test_figures_agree_with_scikit_learn() -> None:
    from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

    rng = np.random.default_rng(6)
    for _ in range(20):
        truth, probabilities = np.append(rng.integers(0, 4, 60), [0, 1, 2, 3]), rng.random((64, 4)).round(1)
        assert macro_f1(truth, probabilities) == pytest.approx(f1_score(truth, probabilities.argmax(1), average="macro", zero_division=0))
        assert balanced_accuracy(truth, probabilities) == pytest.approx(balanced_accuracy_score(truth, probabilities.argmax(1)))
        assert auroc(truth, probabilities) == pytest.approx(np.mean([roc_auc_score(truth == k, probabilities[:, k]) for k in range(4)]))


def test_auroc_is_the_chance_that_a_positive_scores_above_a_negative() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 60)
    score = rng.random(60).round(1)
    pairs = [(p > n) + 0.5 * (p == n) for p in score[truth == 1] for n in score[truth == 0]]
    assert auroc(truth, np.stack([1 - score, score], 1)) == pytest.approx(np.mean(pairs))


def test_auroc_of_three_classes_is_the_mean_of_one_against_the_rest() -> None:
    truth = np.array([0, 1, 2, 0, 1, 2])
    assert auroc(truth, one_hot([0, 1, 2, 0, 1, 2], 3)) == 1.0
    assert auroc(truth, np.full((6, 3), 1 / 3)) == 0.5


def test_auroc_is_undefined_when_only_one_class_occurs() -> None:
    assert np.isnan(auroc(np.zeros(3, int), one_hot([0, 1, 0], 2)))
    assert classification_metrics(np.zeros(3, int), one_hot([0, 1, 0], 2), rounds=20)["auroc"]["value"] is None


def test_interval_over_patients_is_wider_than_over_their_repeated_images() -> None:
    rng = np.random.default_rng(1)
    truth = np.repeat(rng.integers(0, 2, 30), 10)
    score = np.repeat(np.clip(rng.normal(0.5, 0.3, 30), 0, 1), 10)
    probabilities = np.stack([1 - score, score], 1)
    patients = [f"p{k // 10}" for k in range(300)]
    images = [str(k) for k in range(300)]
    low, high = bootstrap(accuracy, truth, probabilities, patients, rounds=400)
    low_images, high_images = bootstrap(accuracy, truth, probabilities, images, rounds=400)
    assert high - low > 2 * (high_images - low_images)


def test_one_patient_gives_figures_without_an_interval() -> None:
    found = classification_metrics(np.array([0, 1, 0, 1]), one_hot([0, 1, 1, 1], 2), ["p"] * 4, rounds=20)
    assert found["accuracy"] == {"value": 0.75, "low": None, "high": None}
    assert found["patients"] == 1


def test_interval_is_the_same_for_the_same_seed_and_holds_the_figure() -> None:
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 3, 90)
    probabilities = rng.random((90, 3)) + 0.6 * np.eye(3)[truth]
    patients = [f"p{k // 3}" for k in range(90)]
    first = classification_metrics(truth, probabilities, patients, rounds=200, seed=5)
    assert first == classification_metrics(truth, probabilities, patients, rounds=200, seed=5)
    assert first["patients"] == 30
    assert first["images"] == 90
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auroc"):
        assert first[name]["low"] <= first[name]["value"] <= first[name]["high"]


@pytest.mark.parametrize(("truth", "probabilities", "groups"), [
    (np.zeros(0, int), np.zeros((0, 2)), None),
    (np.zeros(3, int), np.zeros((2, 2)), None),
    (np.zeros(3, int), np.zeros((3, 2)), ["a", "b"]),
    (np.array([0, 1, 5]), np.full((3, 2), 0.5), None),
    (np.array([0, 1, -1]), np.full((3, 2), 0.5), None),
    (np.array([0.0, 1.0, 0.5]), np.full((3, 2), 0.5), None),
])
def test_figures_refuse_shapes_and_classes_that_do_not_fit(truth, probabilities, groups) -> None:
    with pytest.raises(ValueError, match="classification_metrics: "):
        classification_metrics(truth, probabilities, groups)
