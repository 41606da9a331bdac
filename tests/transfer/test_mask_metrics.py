"""Figures of masks agree with hand-computed cases and with brute force; empty masks have the documented values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mwm.transfer.mask_metrics import dice, hd95, image_figures, iou, mask_summary, mean_with_interval, nsd, pair_figures, pointing_hit, surface, surface_distances
from mwm.transfer.metrics import bootstrap


def square(top: int, left: int, edge: int, size: int = 12) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[top : top + edge, left : left + edge] = True
    return mask


def brute_surface(mask: np.ndarray) -> list[tuple[int, int]]:
    height, width = mask.shape
    inside = lambda r, c: 0 <= r < height and 0 <= c < width and mask[r, c]  # noqa: E731
    return [(r, c) for r in range(height) for c in range(width)
            if mask[r, c] and not all(inside(r + dr, c + dc) for dr, dc in ((1, 0), (-1, 0), (0, 1), (0, -1)))]


def brute_figures(truth: np.ndarray, predicted: np.ndarray, tolerance: float, spacing: tuple[float, float]) -> dict[str, float]:
    """From all pairs of surface pixels."""
    t, p = np.array(brute_surface(truth)) * spacing, np.array(brute_surface(predicted)) * spacing
    pairs = np.sqrt(((t[:, None] - p[None]) ** 2).sum(-1))
    to_p, to_t = pairs.min(1), pairs.min(0)
    return {"nsd": ((to_p <= tolerance).sum() + (to_t <= tolerance).sum()) / (len(t) + len(p)), "hd95": max(np.percentile(to_p, 95), np.percentile(to_t, 95))}


def test_overlap_of_two_squares_is_that_computed_by_hand() -> None:
    truth, predicted = square(2, 2, 4), square(3, 3, 4)  # 16 pixels each, 9 in common
    assert dice(truth, predicted) == 2 * 9 / 32
    assert iou(truth, predicted) == 9 / 23


def test_surface_of_a_square_is_its_frame_and_the_border_of_the_image_counts_as_outside() -> None:
    assert surface(square(2, 2, 4)).sum() == 12
    assert surface(np.ones((5, 7), bool)).sum() == 2 * 5 + 2 * 7 - 4
    assert surface(square(2, 2, 1)).sum() == 1


def test_square_shifted_by_three_has_the_distances_computed_by_hand() -> None:
    truth, predicted = square(2, 2, 3), square(2, 5, 3)  # columns 2-4 and 5-7: the left column is 3 from the nearest pixel of the other, then 2, then 1
    to_p, to_t = surface_distances(truth, predicted)
    assert sorted(to_p) == sorted(to_t) == [1, 1, 1, 2, 2, 3, 3, 3]
    assert nsd(truth, predicted, 1.0) == 6 / 16
    assert nsd(truth, predicted, 0.99) == 0
    assert hd95(truth, predicted) == 3
    assert hd95(truth, predicted, spacing=(9.0, 0.5)) == 1.5


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 1.9)])
def test_surface_figures_equal_brute_force_over_all_pairs(spacing: tuple[float, float]) -> None:
    rng = np.random.default_rng(3)
    for shape in ((9, 14), (14, 9), (1, 8), (20, 20)) * 6:
        truth, predicted = rng.random(shape) < rng.choice([0.15, 0.6, 0.95]), rng.random(shape) < rng.choice([0.15, 0.6])
        truth.flat[rng.integers(truth.size)] = predicted.flat[rng.integers(truth.size)] = True
        expected = brute_figures(truth, predicted, 1.3, spacing)
        found = pair_figures(truth, predicted, tolerance=1.3, spacing=spacing)
        assert found["nsd"] == pytest.approx(expected["nsd"])
        assert found["hd95"] == pytest.approx(expected["hd95"])
        assert {tuple(p) for p in np.argwhere(surface(truth))} == set(brute_surface(truth))


def test_overlap_agrees_with_scikit_learn() -> None:
    from sklearn.metrics import f1_score, jaccard_score

    rng = np.random.default_rng(4)
    for _ in range(20):
        truth, predicted = rng.random((2, 11, 8)) < 0.4
        assert dice(truth, predicted) == pytest.approx(f1_score(truth.ravel(), predicted.ravel()))
        assert iou(truth, predicted) == pytest.approx(jaccard_score(truth.ravel(), predicted.ravel()))


def test_largest_surface_distance_agrees_with_scikit_image() -> None:
    from skimage.metrics import hausdorff_distance

    truth, predicted = square(1, 1, 3), square(5, 6, 4)
    to_p, to_t = surface_distances(truth, predicted)
    assert max(to_p.max(), to_t.max()) == pytest.approx(hausdorff_distance(surface(truth), surface(predicted)))


def test_empty_masks_have_the_documented_values() -> None:
    empty, full = np.zeros((3, 4), bool), np.ones((3, 4), bool)
    assert pair_figures(empty, empty, tolerance=1.0) == {"dice": 1.0, "iou": 1.0, "nsd": 1.0, "hd95": 0.0}
    for truth, predicted in ((empty, full), (full, empty)):
        assert pair_figures(truth, predicted, tolerance=1.0) == {"dice": 0.0, "iou": 0.0, "nsd": 0.0, "hd95": 5.0}
    assert pair_figures(empty, full, tolerance=1.0, spacing=(2.0, 2.0))["hd95"] == 10.0
    assert math.isnan(pointing_hit(empty, np.zeros((3, 4))))


def test_equal_masks_are_perfect_whatever_their_shape() -> None:
    mask = np.random.default_rng(0).random((13, 7)) < 0.5
    assert pair_figures(mask, mask, tolerance=0.0) == {"dice": 1.0, "iou": 1.0, "nsd": 1.0, "hd95": 0.0}


def test_pointing_looks_at_the_highest_score_only_and_shares_ties() -> None:
    truth, scores = square(2, 2, 3), np.zeros((12, 12))
    scores[0, 0] = 2.0
    assert pointing_hit(truth, scores) == 0
    assert pointing_hit(truth, scores, tolerance=3.0) == 1  # (0, 0) is 2.83 from (2, 2)
    assert pointing_hit(truth, scores, tolerance=2.8) == 0
    scores[3, 3] = 2.0
    assert pointing_hit(truth, scores) == 0.5
    scores[3, 3] = 2.1
    assert pointing_hit(truth, scores) == 1


def test_several_classes_are_averaged_over_those_that_occur() -> None:
    truth, predicted = np.zeros((2, 4), int), np.zeros((2, 4), int)
    truth[:, :2], predicted[:, :2] = 1, 1
    predicted[0, 3] = 3
    figures = image_figures(truth, predicted, 3, tolerance=1.0)
    assert figures["dice"] == 0.5
    assert figures["by_class"][0]["dice"] == 1
    assert figures["by_class"][1] is None
    assert figures["by_class"][2]["dice"] == 0
    nothing = image_figures(np.zeros((2, 4)), np.zeros((2, 4)), 3, tolerance=1.0)
    assert (nothing["dice"], nothing["hd95"]) == (1.0, 0.0)


def test_interval_of_a_mean_is_that_of_the_patient_bootstrap_of_classification() -> None:
    rng = np.random.default_rng(5)
    values, patients = rng.random(60), [f"p{k // 4}" for k in range(60)]
    found = mean_with_interval(values, patients, rounds=300, seed=7)
    low, high = bootstrap(lambda truth, _: float(truth.mean()), values, np.zeros((60, 2)), patients, rounds=300, seed=7)
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))
    assert found["value"] == pytest.approx(values.mean())
    assert found["patients"] == 15


def test_interval_over_patients_is_wider_than_over_their_images() -> None:
    values = np.repeat(np.random.default_rng(0).random(12), 10)
    by_patient = mean_with_interval(values, [f"p{k // 10}" for k in range(120)], rounds=400)
    by_image = mean_with_interval(values, rounds=400)
    assert by_patient["high"] - by_patient["low"] > 2 * (by_image["high"] - by_image["low"])
    assert by_image["patients"] is None


def test_values_that_are_not_defined_are_left_out_of_the_mean() -> None:
    found = mean_with_interval([1.0, math.nan, 0.0], ["a", "b", "c"], rounds=50)
    assert (found["value"], found["images"], found["patients"]) == (0.5, 2, 2)
    assert mean_with_interval([math.nan], ["a"])["value"] is None


def test_one_patient_has_no_interval() -> None:
    found = mean_with_interval([0.5, 1.0], ["a", "a"], rounds=50)
    assert (found["value"], found["low"], found["high"], found["patients"]) == (0.75, None, None, 1)


def test_summary_separates_images_with_and_without_something_to_find() -> None:
    perfect, missed = {"dice": 1.0, "iou": 1.0, "nsd": 1.0, "hd95": 0.0}, {"dice": 0.0, "iou": 0.0, "nsd": 0.0, "hd95": 9.0}
    rows = [perfect | {"pointing": 1.0, "truth_pixels": 5, "predicted_pixels": 5, "by_class": []},
            missed | {"pointing": 0.0, "truth_pixels": 5, "predicted_pixels": 0, "by_class": []},
            perfect | {"pointing": math.nan, "truth_pixels": 0, "predicted_pixels": 0, "by_class": []},
            missed | {"pointing": math.nan, "truth_pixels": 0, "predicted_pixels": 3, "by_class": []}]
    found = mask_summary(rows, ["foreground"], ["a", "a", "b", "c"], rounds=50)
    assert found["dice"]["value"] == found["dice_positive"]["value"] == found["marked_negatives"]["value"] == 0.5
    assert (found["images"], found["positives"], found["patients"]) == (4, 2, 3)
    assert found["pointing"]["images"] == 2


@pytest.mark.parametrize(("call", "words"), [
    (lambda: dice(np.zeros((2, 2)), np.zeros((2, 3))), "shape of truth"),
    (lambda: surface_distances(np.zeros((2, 2)), np.ones((2, 2))), "must not be empty"),
    (lambda: hd95(np.ones((2, 2)), np.ones((2, 2)), spacing=(0.0, 1.0)), "spacing must be"),
    (lambda: nsd(np.ones((2, 2)), np.ones((2, 2)), -1.0), "tolerance must be"),
    (lambda: pointing_hit(np.ones((2, 2)), np.full((2, 2), np.nan)), "got NaN"),
    (lambda: mean_with_interval([1.0, 2.0], ["a"]), "patient of each"),
])
def test_unfit_arguments_are_refused_in_one_sentence(call, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
