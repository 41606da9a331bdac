"""Pooled AP: that of each fold by pycocotools, weighted by objects; a draw counts images as often as their patient."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from mwm.study.detections import Detections, _precision, read_detections
from mwm.study.errors import StudyError
from mwm.transfer.coco import encode
from mwm.transfer.coco_metrics import Matches, average_precision

coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")


def _cell(folder: Path, generator: np.random.Generator, fold: int, images: int, copies: int = 1) -> dict[str, str]:
    """Boxes near the truth, missed ones and false ones; `copies` writes every image so often under other names."""
    folder.mkdir(parents=True)
    truth = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cyst"}]}
    results, patients = [], {}
    drawn = [[(generator.uniform(5, 60, 2), generator.uniform(10, 30, 2), generator.normal(0, 3, 2), generator.uniform()) for _ in range(generator.integers(1, 4))]
             for _ in range(images)]
    for k in range(images * copies):
        name = f"f{fold}_{k}.png"
        truth["images"].append({"id": k + 1, "file_name": name, "width": 100, "height": 100})
        patients[name] = f"p{fold}_{k % images // 2}" + ("" if copies == 1 else f"c{k // images}")
        for corner, size, shift, score in drawn[k % images]:
            note = {"id": len(truth["annotations"]) + 1, "image_id": k + 1, "category_id": 1, "bbox": [*corner, *size], "area": float(size.prod()), "iscrowd": 0}
            truth["annotations"].append(note)
            if score > 0.2:
                results.append({"image_id": k + 1, "category_id": 1, "bbox": [*(corner + shift), *size], "score": score})
            if score > 0.7:
                results.append({"image_id": k + 1, "category_id": 1, "bbox": [70.0, 70.0, 20.0, 20.0], "score": score / 2})
    (folder / "ground_truth.json").write_text(json.dumps(truth))
    (folder / "predictions.json").write_text(json.dumps(results))
    return patients


def _ap(folder: Path) -> float:
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO(str(folder / "ground_truth.json"))
        run = COCOeval(truth, truth.loadRes(str(folder / "predictions.json")), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return float(run.stats[0])


def _objects(folder: Path) -> int:
    return len(json.loads((folder / "ground_truth.json").read_text())["annotations"])


def test_pooled_ap_is_the_mean_of_the_folds_weighted_by_objects(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    patients = {fold: _cell(tmp_path / str(fold), generator, fold, 6 + 4 * fold) for fold in range(3)}
    found = read_detections([(fold, tmp_path / str(fold)) for fold in range(3)], patients)
    wanted = np.average([_ap(tmp_path / str(fold)) for fold in range(3)], weights=[_objects(tmp_path / str(fold)) for fold in range(3)])
    assert found.statistic("box_ap")(np.ones(len(found.patients)))[0] == pytest.approx(wanted, abs=1e-9)
    assert "mask_ap" not in found.endpoints and "box_ap50" in found.endpoints and found.images == 30


def test_a_draw_equals_the_images_written_out(tmp_path: Path) -> None:
    patients = {0: _cell(tmp_path / "once", np.random.default_rng(1), 0, 8)}
    once: Detections = read_detections([(0, tmp_path / "once")], patients)
    written = {0: _cell(tmp_path / "thrice", np.random.default_rng(1), 0, 8, copies=3)}
    thrice = read_detections([(0, tmp_path / "thrice")], written)
    assert once.statistic("box_ap")(np.full(len(once.patients), 3))[0] == pytest.approx(thrice.statistic("box_ap")(np.ones(len(thrice.patients)))[0], abs=1e-9)


@pytest.mark.parametrize("ignored", [False, True])
def test_many_draws_at_once_equal_one_after_the_other(ignored: bool) -> None:
    """All draws of the protocol: with the thousand that one at a time had time for, no corrected p value could fall below 0.05."""
    generator = np.random.default_rng(5)
    quality, image = generator.uniform(size=60), generator.integers(0, 12, 60)
    hit = np.stack([quality > 0.4 + 0.06 * t for t in range(10)])
    hit[9] = False
    matches = Matches(image, hit, generator.uniform(size=hit.shape) < (0.8 if ignored else 2), generator.integers(0, 3, 12))
    weights = generator.integers(0, 3, (50, 12)).astype(float)
    weights[0], weights[1] = 0, matches.objects == 0
    found = _precision(matches, weights)
    np.testing.assert_allclose(found, np.stack([average_precision(matches, row)[0] for row in weights]), atol=1e-12)
    assert np.isnan(found[:2]).all() and np.isfinite(found[2:]).all()
    nothing = Matches(np.zeros(0, np.int64), np.zeros((10, 0), bool), np.zeros((10, 0), bool), matches.objects)
    assert (_precision(nothing, weights[2:]) == 0).all()


def test_detections_of_strangers_are_refused(tmp_path: Path) -> None:
    patients = _cell(tmp_path / "cell", np.random.default_rng(2), 0, 4)
    patients.pop(next(iter(patients)))
    with pytest.raises(StudyError, match="got 1 others"):
        read_detections([(0, tmp_path / "cell")], {0: patients})


def test_a_fold_in_which_nothing_is_found_counts_as_none_for_masks_too(tmp_path: Path) -> None:
    patients = {fold: _cell(tmp_path / str(fold), np.random.default_rng(fold), fold, 6) for fold in range(2)}
    square = encode(np.ones((100, 100), bool))
    for fold in range(2):
        folder = tmp_path / str(fold)
        truth = json.loads((folder / "ground_truth.json").read_text())
        truth["annotations"] = [note | {"segmentation": square} for note in truth["annotations"]]
        (folder / "ground_truth.json").write_text(json.dumps(truth))
        results = [] if fold else [row | {"segmentation": square} for row in json.loads((folder / "predictions.json").read_text())]
        (folder / "predictions.json").write_text(json.dumps(results))
    found = read_detections([(fold, tmp_path / str(fold)) for fold in range(2)], patients)
    assert "mask_ap" in found.endpoints
    assert found.only([1]).statistic("mask_ap")(np.ones(len(found.only([1]).patients)))[0] == 0
