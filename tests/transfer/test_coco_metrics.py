"""AP equals pycocotools' own, weights equal copies, and hand-made cases give the numbers a person gets."""

from __future__ import annotations

import contextlib
import io
import sys

import numpy as np
import pytest

from mwm.transfer.coco import encode
from mwm.transfer.coco_metrics import AREAS, FIGURES, average_precision, detection_metrics, figures, match
from mwm.transfer.detect_results import summary

pytest.importorskip("pycocotools")


def box_mask(box: list[float], size: int = 200) -> dict:
    mask = np.zeros((size, size), bool)
    x, y, w, h = (round(v) for v in box)
    mask[y : y + h, x : x + w] = True
    return encode(mask)


def drawn(seed: int, images: int = 12, classes: int = 3) -> tuple[dict, list[dict]]:
    """Random objects of all sizes with crowds, and detections: moved objects of any class, and inventions."""
    rng = np.random.default_rng(seed)
    truth = {"images": [{"id": k + 1, "width": 200, "height": 200} for k in range(images)],
             "categories": [{"id": k + 1, "name": f"c{k}"} for k in range(classes)], "annotations": []}
    results = []
    for image in range(1, images + 1):
        for _ in range(int(rng.integers(0, 5))):
            w, h = np.exp(rng.uniform(np.log(6), np.log(150), 2))
            box = [float(rng.uniform(0, 199 - w)), float(rng.uniform(0, 199 - h)), float(w), float(h)]
            label = int(rng.integers(1, classes + 1))
            truth["annotations"].append({"id": len(truth["annotations"]) + 1, "image_id": image, "category_id": label, "bbox": box, "area": w * h,
                                         "iscrowd": int(rng.random() < 0.1), "segmentation": box_mask(box)})
            for _ in range(int(rng.integers(0, 3))):
                moved = [float(v) for v in np.clip(np.array(box) + rng.normal(0, 4, 4), 1, 180)]
                results.append({"image_id": image, "category_id": label if rng.random() < 0.8 else int(rng.integers(1, classes + 1)), "bbox": moved,
                                "score": float(rng.random()), "segmentation": box_mask(moved)})
        if rng.random() < 0.5:
            results.append({"image_id": image, "category_id": 1, "bbox": [5.0, 5, 40, 40], "score": float(rng.random()), "segmentation": box_mask([5, 5, 40, 40])})
    return truth, results


def official(truth: dict, results: list[dict], kind: str) -> np.ndarray:
    """AP, AP50, AP75, small, medium, large and AR of 100 detections by pycocotools' summarize."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = {key: [dict(row) for row in rows] for key, rows in truth.items()}
        gt.createIndex()
        judge = COCOeval(gt, gt.loadRes([{k: v for k, v in row.items() if k != ("segmentation" if kind == "bbox" else "bbox")} for row in results]), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    values = np.array([*judge.stats[:6], judge.stats[8]])
    return np.where(values == -1, np.nan, values)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(4))
def test_figures_equal_those_of_pycocotools(kind: str, seed: int) -> None:
    truth, results = drawn(seed)
    np.testing.assert_allclose(figures(match(truth, results, kind)), official(truth, results, kind), rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_weights_equal_copies_of_the_images(seed: int) -> None:
    truth, results = drawn(seed)
    weights = np.random.default_rng(seed).integers(0, 4, len(truth["images"]))
    copied = {"images": [], "categories": truth["categories"], "annotations": []}
    rows = []
    for image, times in enumerate(weights, 1):
        for _ in range(times):
            number = len(copied["images"]) + 1
            copied["images"].append({"id": number, "width": 200, "height": 200})
            copied["annotations"] += [row | {"image_id": number, "id": 1000 * number + row["id"]} for row in truth["annotations"] if row["image_id"] == image]
            rows += [row | {"image_id": number} for row in results if row["image_id"] == image]
    np.testing.assert_allclose(figures(match(truth, results, "bbox"), weights), official(copied, rows, "bbox"), rtol=0, atol=1e-9)


def hand(boxes: list[list[float]], found: list[tuple[int, list[float], float]], images: int = 2) -> tuple[dict, list[dict]]:
    truth = {"images": [{"id": k + 1, "width": 200, "height": 200} for k in range(images)], "categories": [{"id": 1, "name": "a"}],
             "annotations": [{"id": k + 1, "image_id": k + 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0} for k, box in enumerate(boxes)]}
    return truth, [{"image_id": image, "category_id": 1, "bbox": box, "score": score} for image, box, score in found]


def test_one_of_two_objects_found_gives_51_of_101_recall_points() -> None:
    truth, results = hand([[10, 10, 40, 40], [10, 10, 40, 40]], [(1, [10, 10, 40, 40], 0.9)])
    values, recall = average_precision(match(truth, results, "bbox")[0][0])
    np.testing.assert_allclose(values, 51 / 101)
    np.testing.assert_allclose(recall, 0.5)


def test_false_alarm_above_the_hit_halves_precision_and_one_below_costs_nothing() -> None:
    above = hand([[10, 10, 40, 40]], [(1, [10, 10, 40, 40], 0.5), (1, [120, 120, 40, 40], 0.9)], images=1)
    below = hand([[10, 10, 40, 40]], [(1, [10, 10, 40, 40], 0.9), (1, [120, 120, 40, 40], 0.5)], images=1)
    assert figures(match(*above, "bbox"))[0] == pytest.approx(0.5)
    assert figures(match(*below, "bbox"))[0] == pytest.approx(1.0)


def test_box_of_iou_0_8_counts_up_to_that_threshold() -> None:
    truth, results = hand([[0, 0, 100, 100]], [(1, [0, 0, 100, 81], 0.9)], images=1)
    values, _ = average_precision(match(truth, results, "bbox")[0][0])
    np.testing.assert_allclose(values, [1, 1, 1, 1, 1, 1, 1, 0, 0, 0])


def test_nothing_found_is_zero_and_nothing_to_find_is_not_defined() -> None:
    truth, _ = hand([[10, 10, 40, 40]], [], images=1)
    report = detection_metrics(truth, [], masks=False, rounds=20)
    assert report["box_ap"] == {"value": 0.0, "low": None, "high": None}
    two, _ = hand([[10, 10, 40, 40]] * 2, [], images=2)
    assert detection_metrics(two, [], masks=False, rounds=20)["box_ap"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert report["box_ap_large"]["value"] is None
    assert report["objects"] == 1


def test_interval_resamples_patients_not_images() -> None:
    boxes = [[10.0, 10, 40, 40]] * 20
    truth, results = hand(boxes, [(k, [10, 10, 40, 40], 0.9) for k in range(1, 11)], images=20)
    alone = detection_metrics(truth, results, None, masks=False, rounds=300)["box_ap"]
    two = detection_metrics(truth, results, ["found"] * 10 + ["missed"] * 10, masks=False, rounds=300)
    assert two["patients"] == 2
    assert (two["box_ap"]["low"], two["box_ap"]["high"]) == (0.0, 1.0)  # a draw holds one patient twice half of the time
    assert 0.2 < alone["low"] < alone["value"] < alone["high"] < 0.8


def test_one_patient_gives_no_interval() -> None:
    truth, results = hand([[10.0, 10, 40, 40]] * 4, [(k, [10, 10, 40, 40], 0.9) for k in (1, 2)], images=4)
    report = detection_metrics(truth, results, ["p"] * 4, masks=False, rounds=20)
    assert (report["box_ap"]["low"], report["box_ap"]["high"]) == (None, None) and report["box_ap"]["value"] > 0
    assert "95 %" not in summary(report)


def test_same_seed_gives_the_same_interval_and_groups_must_fit() -> None:
    truth, results = drawn(1)
    groups = [f"p{k // 3}" for k in range(len(truth["images"]))]
    assert detection_metrics(truth, results, groups, masks=True, rounds=30, seed=3) == detection_metrics(truth, results, groups, masks=True, rounds=30, seed=3)
    with pytest.raises(ValueError, match="groups must name the patient"):
        detection_metrics(truth, results, groups[1:], masks=False)
    with pytest.raises(ValueError, match="must hold images"):
        detection_metrics({"images": [], "annotations": [], "categories": []}, [], masks=False)


def test_matching_leaves_its_input_alone() -> None:
    truth, results = drawn(2)
    before = repr((truth, results))
    match(truth, results, "segm", areas=tuple(AREAS))
    assert repr((truth, results)) == before
    assert len(FIGURES) == 7


def test_missing_pycocotools_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from mwm.transfer.coco_metrics import pycocotools

    for name in [name for name in sys.modules if name.split(".")[0] == "pycocotools"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ImportError, match="pip install"):
        pycocotools()
