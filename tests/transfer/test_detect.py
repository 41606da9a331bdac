"""A detector learns drawn objects, leaves complete results that pycocotools confirms, can be used again, and refuses what it cannot learn from."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from drawn_objects import SIZE, as_coco, rewrite, write_objects
from PIL import Image

from mwm.train.export import Preprocessing, export
from mwm.transfer import FinetuneConfig, TransferError, finetune
from mwm.transfer.coco import decode
from mwm.transfer.coco_metrics import figures, match
from mwm.transfer.detect_model import Detector
from mwm.transfer.detect_predict import predict_objects
from mwm.transfer.pyramid import FeaturePyramid

pytest.importorskip("pycocotools")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run with an untrained resnet10t for images of 64 pixels."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    export(folder, "resnet10t", timm.create_model("resnet10t", features_only=True, in_chans=1), Preprocessing((SIZE, SIZE), 1, (0.43,), (0.2,), {}), seed=0)
    return folder


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_objects(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_objects(tmp_path_factory.mktemp("small"), patients=10)


def config(run: Path, data: Path, out: Path, **changes) -> FinetuneConfig:
    return FinetuneConfig(**({"run": run, "data": data, "out": out, "task": "detect", "progress": False, "bootstrap": 20, "epochs": 1, "batch_size": 6, "lr": 2e-3,
                              "layer_decay": 1.0, "device": "cpu", "detect_width": 16, "workers": 1, "precision": "fp32"} | changes))


@pytest.fixture(scope="module")
def learnt(run: Path, index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(config(run, index, tmp_path_factory.mktemp("learnt") / "out", epochs=8, batch_size=3), command="mwm finetune …")


def test_drawn_objects_are_learnt_and_results_are_complete(learnt: Path) -> None:
    report = json.loads((learnt / "metrics.json").read_text())
    assert report["method"] == "Mask R-CNN"
    assert report["classes"] == ["disc", "square"]
    assert report["test"]["box_ap50"]["value"] > 0.5
    assert report["test"]["mask_ap50"]["value"] > 0.5
    assert report["test"]["patients"] == 4
    assert report["test"]["images"] == 8
    assert report["images"]["train"] == 30
    assert any("negatives" in note for note in report["notes"])
    assert {p.name for p in learnt.iterdir()} == {"metrics.json", "predictions.json", "ground_truth.json", "gallery.png", "history.csv", "model.json", "model.safetensors"}
    with Image.open(learnt / "gallery.png") as page:
        assert page.size[0] > 400


def test_stored_predictions_give_the_stored_figures(learnt: Path) -> None:
    report = json.loads((learnt / "metrics.json").read_text())["test"]
    truth, results = (json.loads((learnt / name).read_text()) for name in ("ground_truth.json", "predictions.json"))
    for kind, prefix in (("bbox", "box"), ("segm", "mask")):
        values = figures(match(truth, results, kind))
        assert values[0] == pytest.approx(report[f"{prefix}_ap"]["value"], abs=1e-9)
        assert values[1] == pytest.approx(report[f"{prefix}_ap50"]["value"], abs=1e-9)


def test_metrics_hold_no_file_names_and_no_patients(learnt: Path) -> None:
    text = (learnt / "metrics.json").read_text()
    assert "p01" not in text
    assert "images/" not in text


def test_prediction_of_the_stored_model_equals_that_of_the_training_run(learnt: Path, index: Path, tmp_path: Path) -> None:
    out = predict_objects(learnt, index, tmp_path / "found", split="test", overlays=True, least_score=0.05, device="cpu", batch_size=6, progress=False)
    content = json.loads((out / "predictions.json").read_text())
    stored = [row for row in json.loads((learnt / "predictions.json").read_text()) if row["score"] >= 0.05]
    assert len(content["annotations"]) == len(stored)
    for row, before in zip(content["annotations"], stored, strict=True):
        assert row["category_id"] == before["category_id"]
        assert row["score"] == pytest.approx(before["score"], abs=1e-3)
        np.testing.assert_allclose(row["bbox"], before["bbox"], atol=0.2)
    assert [row["file_name"] for row in content["images"]] == [row["file_name"] for row in json.loads((learnt / "ground_truth.json").read_text())["images"]]
    assert len(list((out / "overlays").rglob("*.png"))) == len(content["images"])


def test_areas_of_predictions_are_those_of_their_masks(learnt: Path, index: Path, tmp_path: Path) -> None:
    out = predict_objects(learnt, index, tmp_path / "out", split="test", device="cpu", progress=False)
    rows = json.loads((out / "predictions.json").read_text())["annotations"]
    assert rows and all(row["area"] == decode(row["segmentation"]).sum() for row in rows)


def test_images_of_one_stem_keep_a_picture_each(learnt: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "a.jpg", "b.png"):
        Image.fromarray(np.full((50, 80), 90, np.uint8)).save(tmp_path / "images" / name)
    out = predict_objects(learnt, tmp_path / "images", tmp_path / "found", overlays=True, device="cpu", progress=False)
    assert sorted(path.name for path in (out / "overlays").iterdir()) == ["a.jpg.png", "a.png.png", "b.png"]


def test_prediction_names_what_cannot_be_read_and_refuses_other_tasks(learnt: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.fromarray(np.full((50, 80), 90, np.uint8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "b.png").write_bytes(b"no image")
    out = predict_objects(learnt, tmp_path / "images", tmp_path / "out", device="cpu", progress=False)
    assert [row["file_name"] for row in json.loads((out / "predictions.json").read_text())["images"]] == ["a.png"]
    assert "b.png" in (out / "skipped.csv").read_text()
    with pytest.raises(TransferError, match="RESULTS must"):
        predict_objects(tmp_path / "images", tmp_path / "images", tmp_path / "none", device="cpu", progress=False)
    with pytest.raises(FileExistsError, match="--overwrite"):
        predict_objects(learnt, tmp_path / "images", out, device="cpu", progress=False)


def test_coco_files_give_the_same_objects_as_the_index(run: Path, small: Path, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps(as_coco(small)))
    one = finetune(config(run, tmp_path / "data.json", tmp_path / "one", images=small.parent / "images"))
    two = finetune(config(run, small, tmp_path / "two"))
    first, second = (json.loads((out / "ground_truth.json").read_text()) for out in (one, two))
    assert first["annotations"] == second["annotations"]
    assert first["categories"] == second["categories"]
    assert [row["file_name"].rpartition("/")[2] for row in first["images"]] == [row["file_name"].rpartition("/")[2] for row in second["images"]]


def test_resumed_run_gives_the_very_weights_of_an_uninterrupted_one(run: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    from mwm.transfer import fit as fitting

    whole = finetune(config(run, small, tmp_path / "whole", epochs=2))
    real, calls = fitting._Progress.end_epoch, []
    monkeypatch.setattr(fitting.fit, "__kwdefaults__", {**fitting.fit.__kwdefaults__, "checkpoint_seconds": 0.0})

    def stopped(self, row):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(1)
        real(self, row)

    monkeypatch.setattr(fitting._Progress, "end_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        finetune(config(run, small, tmp_path / "cut", epochs=2))
    monkeypatch.setattr(fitting._Progress, "end_epoch", real)
    assert not (tmp_path / "cut").exists()
    cut = finetune(config(run, small, tmp_path / "cut", epochs=2, resume=True))
    one, two = (load_file(str(out / "model.safetensors")) for out in (whole, cut))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_boxes_without_masks_train_a_faster_rcnn_also_from_scratch_in_bf16_with_frozen_norms(run: Path, tmp_path: Path) -> None:
    index = write_objects(tmp_path / "data", masks=False, patients=10)
    out = finetune(config(run, index, tmp_path / "out", init="scratch", precision="bf16", detect_norm="frozen", store_weights=False))
    report = json.loads((out / "metrics.json").read_text())
    assert report["method"] == "Faster R-CNN"
    assert "mask_ap" not in report["test"]
    assert any("without a mask" in note for note in report["notes"])
    assert not (out / "model.safetensors").exists()


def test_masks_without_boxes_and_splits_made_by_patient(run: Path, tmp_path: Path) -> None:
    index = write_objects(tmp_path / "data", boxes=False, split=False, patients=12)
    out = finetune(config(run, index, tmp_path / "out", detect_masks=False))
    report = json.loads((out / "metrics.json").read_text())
    assert report["classes"] == ["object"]
    assert sum(report["patients"].values()) == 12
    assert min(report["patients"].values()) >= 2


def moved(row: dict, box: list[float]) -> dict:
    return row | {"boxes": json.dumps([{"label": "disc", "bbox_xyxy": box}])} if row["boxes"] else row


@pytest.mark.parametrize(("change", "words"), [
    (lambda row: moved(row, [70, 5, 90, 9]), "wholly outside"),
    (lambda row: moved(row, [5, 5, 5, 9]), "must have an area"),
    (lambda row: row | {"boxes": "", "mask": ""} if row["split"] == "test" else row, "images of test must hold objects"),
    (lambda row: row | {"boxes": "", "mask": ""} if row["split"] == "train" else row, "images of train must hold objects"),
    (lambda row: row | {"boxes": "", "mask": ""}, "must have a column `mask`"),
    (lambda row: row | {"boxes": row["boxes"].replace("disc", "disk")} if row["split"] == "val" else row, "got 'disk', which does not; is it 'disc'"),
    (lambda row: row | {"patient": "p00"} if row["file"] == "images/p04_0.png" else row, "a patient must be in one split only"),
])
def test_data_that_cannot_be_learnt_from_are_refused_in_one_sentence(change, words: str, run: Path, tmp_path: Path) -> None:
    index = rewrite(write_objects(tmp_path / "data", patients=10), change)
    with pytest.raises(ValueError, match=words) as caught:
        finetune(config(run, index, tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_boxes_that_reach_out_are_cut_with_a_note(run: Path, tmp_path: Path) -> None:
    index = rewrite(write_objects(tmp_path / "data", patients=10, masks=False), lambda row: moved(row, [-4, 20, 30, 50]) if row["split"] == "test" else row)
    report = json.loads((finetune(config(run, index, tmp_path / "out")) / "metrics.json").read_text())
    assert any("reached beyond" in note for note in report["notes"])


@pytest.mark.parametrize(("change", "words"), [
    (lambda c: (c["images"][0].update(width=65), [row.pop("segmentation") for row in c["annotations"]]), "as the COCO file says"),
    (lambda c: c["annotations"][0].update(image_id=99999), "image_id 99999"),
    (lambda c: c["images"][0].update(split="holdout"), "must be train, val or test"),
    (lambda c: c["annotations"].clear(), "must hold objects"),
])
def test_wrong_coco_file_is_refused(change, words: str, run: Path, small: Path, tmp_path: Path) -> None:
    content = as_coco(small)
    change(content)
    (tmp_path / "data.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        finetune(config(run, tmp_path / "data.json", tmp_path / "out", images=small.parent / "images"))


def test_encoder_without_the_strides_and_wrong_settings_are_refused() -> None:
    with pytest.raises(TransferError, match="strides 4, 8, 16 and 32"):
        Detector(FeaturePyramid(torch.nn.Identity(), (0, 1), (8, 16), (4, 8)), 1, (SIZE, SIZE), masks=True)
    for change, words in (({"detect_width": 20}, "multiple of 8"), ({"detect_norm": "layer"}, "batch | frozen")):
        with pytest.raises(TransferError, match=words):
            FinetuneConfig(**({"run": "r", "data": "d", "task": "detect"} | change))


@pytest.mark.parametrize("edge", [64, 224, 800])
def test_anchors_cover_two_strides_to_the_whole_image(edge: int) -> None:
    channels = (8, 8, 8, 8)
    model = Detector(FeaturePyramid(torch.nn.Identity(), (0, 1, 2, 3), channels, (4, 8, 16, 32)), 1, (edge, edge), masks=False, width=16)
    sizes = [size for level in model.rpn.anchor_generator.sizes for size in level]
    assert all(level[0] >= 2 * stride for level, stride in zip(model.rpn.anchor_generator.sizes, (4, 8, 16, 32), strict=False))
    assert max(sizes) > 0.6 * edge
    assert min(sizes) == pytest.approx(32 * max(0.25, edge / 800))
    steps = [b / a for a, b in itertools.pairwise(sizes)]
    np.testing.assert_allclose(steps, 2**0.5)
