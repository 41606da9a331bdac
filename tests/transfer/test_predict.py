"""A folder of results is all that is needed: predictions equal those of training, with mwm and without it."""

from __future__ import annotations

import csv
import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mwm.train import TrainError
from mwm.train.export import Preprocessing
from mwm.transfer import FinetuneConfig, PredictConfig, TransferError, finetune, load_classifier, predict
from mwm.transfer.stored import StoredModel, write_model

WAYS = {"all": {"epochs": 2}, "probe": {"linear_probe": True}, "knn": {"knn": True}}


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open() as stream:
        return {row["file"]: row for row in csv.DictReader(stream)}


def trained(run: Path, index: Path, out: Path, **way) -> Path:
    return finetune(FinetuneConfig(**({"run": str(run), "data": str(index), "out": str(out), "progress": False, "bootstrap": 20, "batch_size": 12, "device": "cpu"} | way)))


def settings(results: Path, images: Path, out: Path, **changes) -> PredictConfig:
    return PredictConfig(**({"results": str(results), "images": str(images), "out": str(out), "progress": False, "device": "cpu", "batch_size": 5} | changes))


def changed(folder: Path, **changes) -> None:
    (folder / "model.json").write_text(json.dumps(json.loads((folder / "model.json").read_text()) | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, run: Path) -> tuple[Path, Path]:
    """A fine-tuned classifier and its index."""
    from drawn import rows_with_patients, with_splits, write_index

    folder = tmp_path_factory.mktemp("whole")
    index = write_index(folder / "data", with_splits(rows_with_patients()))
    return trained(run, index, folder / "results", epochs=2), index


@pytest.mark.parametrize("damage", ["[" * 100_000, '{"format": ' + "1" * 5000 + "}"])
def test_json_that_python_cannot_read_is_damage(whole: tuple[Path, Path], tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "results"
    shutil.copytree(whole[0], folder)
    (folder / "model.json").write_text(damage)
    with pytest.raises(TransferError, match="is damaged"):
        load_classifier(folder)


def test_a_network_far_larger_than_its_weights_is_refused_before_it_is_built(whole: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "results"
    shutil.copytree(whole[0], folder)
    changed(folder, encoder="vit_gigantic_patch14_224")
    with pytest.raises(TrainError, match=r"the weights do not fit vit_gigantic.*numbers"):
        load_classifier(folder)


@pytest.mark.parametrize("way", WAYS)
def test_predictions_need_no_run_and_equal_those_of_training(way: str, run: Path, index: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    results = trained(copy, index, tmp_path / "out", **WAYS[way])
    shutil.rmtree(copy)
    moved = results.rename(tmp_path / "moved")
    answers = predict(settings(moved, index, tmp_path / "answers", split="test"))
    found, stored = rows_of(answers / "predictions.csv"), {name: row for name, row in rows_of(moved / "predictions.csv").items() if row["split"] == "test"}
    assert list(found) == list(stored)
    for name, row in found.items():
        assert row["predicted"] == stored[name]["predicted"]
        assert float(row["p_along"]) == pytest.approx(float(stored[name]["p_along"]), abs=2e-5)
        assert float(row["p_along"]) + float(row["p_across"]) == pytest.approx(1, abs=2e-6)


def test_weights_load_into_a_plain_timm_network(whole: tuple[Path, Path], tmp_path: Path) -> None:
    results, index = whole
    facts = json.loads((results / "model.json").read_text())
    model = timm.create_model(facts["encoder"], in_chans=facts["preprocessing"]["channels"], num_classes=len(facts["classes"]))
    model.load_state_dict(load_file(results / "model.safetensors"))
    stored = {name: row for name, row in rows_of(results / "predictions.csv").items() if row["split"] == "test"}
    prepared = facts["preprocessing"]
    pixels = np.stack([np.asarray(Image.open(index.parent / name), np.float32) / 255 for name in stored])  # of the run's size already
    x = (torch.from_numpy(pixels)[:, None] - prepared["mean"][0]) / prepared["std"][0]
    with torch.no_grad():
        chances = torch.softmax(model.eval()(x), 1)
    assert np.allclose(chances[:, facts["classes"].index("along")], [float(row["p_along"]) for row in stored.values()], atol=1e-4)
    assert torch.allclose(load_classifier(results)(x).float(), chances, atol=1e-5)


def test_a_folder_of_new_images_is_answered_and_bad_files_are_listed(whole: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "new"
    shutil.copytree(whole[1].parent / "images", folder)
    (folder / "broken.png").write_bytes(b"no image")
    answers = predict(settings(whole[0], folder, tmp_path / "answers"))
    assert len(rows_of(answers / "predictions.csv")) == 60
    assert "broken.png" in (answers / "skipped.csv").read_text()
    assert json.loads((answers / "metrics.json").read_text()) | {} == {"task": "classify", "method": "prediction", "classes": ["across", "along"], "images": 60, "skipped": 1}
    with pytest.raises(ValueError, match=r"broken\.png"):
        predict(settings(whole[0], folder, tmp_path / "strict", strict=True))
    with pytest.raises(FileExistsError, match="--overwrite"):
        predict(settings(whole[0], folder, answers))
    predict(settings(whole[0], folder, answers, overwrite=True))
    for file in folder.glob("p*.png"):
        file.unlink()
    with pytest.raises(TransferError, match="IMAGES must hold readable images, got 1 that are not"):
        predict(settings(whole[0], folder, tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_a_trained_model_is_never_overwritten_by_answers(whole: tuple[Path, Path]) -> None:
    with pytest.raises(FileExistsError, match="holds a trained model"):
        predict(settings(whole[0], whole[1], whole[0], overwrite=True))
    assert (whole[0] / "model.safetensors").is_file()


@pytest.mark.parametrize(("damage", "words"), [
    (lambda folder: (folder / "model.json").unlink(), "must be a folder that mwm finetune wrote"),
    (lambda folder: (folder / "model.json").write_text("{}"), "is damaged"),
    (lambda folder: (folder / "model.safetensors").unlink(), "with --store-weights"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "is damaged"),
    (lambda folder: changed(folder, encoder="resnet14t"), "do not fit resnet14t"),
    (lambda folder: changed(folder, classes=["one"]), "do not fit resnet10t"),
    (lambda folder: save_file({f"encoder.{k}": v for k, v in load_file(folder / "model.safetensors").items()}, folder / "model.safetensors"), "do not fit resnet10t"),
    (lambda folder: changed(folder, task="paint"), "task of RESULTS must be classify"),
    (lambda folder: changed(folder, task=["classify"]), "is damaged"),
    (lambda folder: changed(folder, task="segment"), "must tell mask_classes, head_width"),
    (lambda folder: changed(folder, task="segment", facts={"mask_classes": {"names": ["a"], "values": None, "per_label": False}, "head_width": 10**9, "head_norm": "group"}),
     "must tell mask_classes, head_width"),
    (lambda folder: (save_file({"mean": torch.zeros(3)}, folder / "probe.safetensors"), changed(folder, method="linear probe")), "none named scale"),
    (lambda folder: (save_file({"features": torch.zeros(3, 4), "labels": torch.zeros(3)}, folder / "knn.safetensors"), changed(folder, method="k-NN", facts={"k": -1})),
     "must tell k and temperature"),
    (lambda folder: changed(folder, method="guess"), "method must be fine-tuning"),
    (lambda folder: changed(folder, preprocessing={"size": [10**6, 10**6], "channels": 1, "mean": [0.5], "std": [0.2], "read": {}}), r"preprocessing\.size is out of range"),
    (lambda folder: changed(folder, preprocessing={"size": [32, 32], "channels": 1, "mean": [0.5], "std": [0.0], "read": {}}), r"preprocessing\.std is out of range"),
])
def test_damaged_results_are_refused_in_one_sentence(whole: tuple[Path, Path], tmp_path: Path, damage, words: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole[0], copy)
    damage(copy)
    with pytest.raises(TransferError, match=words) as caught:
        predict(settings(copy, whole[1], tmp_path / "answers"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert not (tmp_path / "answers").exists()


@pytest.mark.parametrize(("change", "words"), [
    ({"results": ""}, "results must be a folder that mwm finetune wrote"), ({"batch_size": 0}, "batch_size must be at least 1"), ({"least_score": 2.0}, "least_score must be in"),
])
def test_settings_of_a_prediction_out_of_range_are_refused_by_name(change: dict, words: str) -> None:
    with pytest.raises(TransferError, match=words):
        PredictConfig(**({"results": "r", "images": "i", "out": "o"} | change))


def test_settings_of_another_task_are_refused(whole: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="overlays must be left out for a model of task classify, got True"):
        predict(settings(whole[0], whole[1], tmp_path / "answers", overlays=True))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_fills_up_under_the_weights_is_named_so(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    model = StoredModel("classify", "fine-tuning", "resnet10t", ("a", "b"), Preprocessing((32, 32), 1, (0.5,), (0.2,)))
    with pytest.raises(OSError) as caught:
        write_model(tmp_path, model, {"weight": torch.zeros(4096)})
    assert caught.value.errno == errno.ENOSPC
