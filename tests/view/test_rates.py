"""ROC curves and calibration agree with their definitions and with scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from mwm.view.calibration import calibration_chart, reliability
from mwm.view.roc import roc_chart, roc_points


def drawn(classes: int, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, classes, count)
    scores = rng.random((count, classes)).round(1) + 0.4 * np.eye(classes)[truth]
    return truth, scores / scores.sum(1, keepdims=True)


def test_points_of_a_curve_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score, roc_curve

    truth, probabilities = drawn(2)
    for scores in (probabilities[:, 1], probabilities[:, 1].round(1), np.full(len(truth), 0.5)):
        x, y = roc_points(truth == 1, scores)
        expected_x, expected_y, _ = roc_curve(truth == 1, scores, drop_intermediate=False)
        assert np.allclose(x, expected_x) and np.allclose(y, expected_y)
        assert ((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2).sum() == pytest.approx(roc_auc_score(truth == 1, scores))


def test_one_curve_per_class_and_one_for_two_classes() -> None:
    for classes, curves in ((2, 1), (3, 3)):
        truth, probabilities = drawn(classes)
        chart = roc_chart(truth, probabilities, [f"class {k}" for k in range(classes)], notes=["x"] * classes)
        assert sum(shape[0] == "line" and shape[2].startswith("s") for shape in chart.shapes) == curves
        assert chart.image().size[0] > 300
    with pytest.raises(ValueError, match="at least two classes, got one"):
        roc_chart(np.zeros(4, int), np.full((4, 2), 0.5), ["a", "b"])
    with pytest.raises(ValueError, match=r"probabilities must be \[N, K\]"):
        roc_chart(np.zeros(4, int), np.full((4, 3), 0.5), ["a", "b"])


def test_calibration_error_is_the_weighted_gap_of_the_bins() -> None:
    truth, probabilities = drawn(3)
    found = reliability(truth, probabilities, bins=5)
    sure, right = probabilities.max(1), probabilities.argmax(1) == truth
    total = 0.0
    for k in range(5):
        inside = (sure > k / 5) & (sure <= (k + 1) / 5)
        assert found.counts[k] == inside.sum()
        if inside.any():
            assert found.accuracy[k] == pytest.approx(right[inside].mean())
            assert found.confidence[k] == pytest.approx(sure[inside].mean())
            total += inside.sum() * abs(right[inside].mean() - sure[inside].mean())
    assert found.error == pytest.approx(total / len(truth))
    assert calibration_chart(truth, probabilities).image().size[0] > 300


def test_a_classifier_that_is_right_as_often_as_it_says_has_no_error() -> None:
    probabilities = np.tile([0.75, 0.25], (4, 1))
    assert reliability(np.array([0, 0, 0, 1]), probabilities).error == pytest.approx(0)
    assert reliability(np.array([1, 1, 1, 1]), probabilities).error == pytest.approx(0.75)
    with pytest.raises(ValueError, match="N = 0 > 0"):
        reliability(np.zeros(0, int), np.zeros((0, 2)))
