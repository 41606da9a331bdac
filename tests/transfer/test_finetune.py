"""Both ways of using an encoder learn drawn classes, leave complete results, and lose nothing that is there."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import draw, rows_with_patients, with_splits, write_index
from PIL import Image
from safetensors.torch import load_file

from mwm.data import Record
from mwm.train import load_encoder
from mwm.transfer import FinetuneConfig, TransferError, finetune
from mwm.transfer.classify_apply import predict_classes
from mwm.transfer.images import CaseImages, decode_cases
from mwm.transfer.labelled import Case, Labelled, read_labelled
from mwm.transfer.mask_metrics import FIGURES
from mwm.transfer.network import parameter_groups
from mwm.transfer.segment_masks import MaskClasses
from mwm.transfer.segment_results import write_predictions


def config(run: Path, data: Path, out: Path, **changes) -> FinetuneConfig:
    return FinetuneConfig(**({"run": str(run), "data": str(data), "out": str(out), "progress": False, "bootstrap": 50, "epochs": 12, "batch_size": 12,
                              "lr": 3e-3, "layer_decay": 1.0, "device": "cpu"} | changes))


@pytest.mark.parametrize(("way", "extra"), [({}, set()), ({"linear_probe": True}, {"probe.safetensors"}), ({"knn": True}, {"knn.safetensors"}),
                                            ({"mixup": 0.2, "label_smoothing": 0.1, "flip": True}, set())], ids=["all", "probe", "knn", "mixed"])
def test_drawn_classes_are_learnt_and_results_are_complete(way: dict, extra: set[str], run: Path, index: Path, tmp_path: Path) -> None:
    out = finetune(config(run, index, tmp_path / "out", **way), command="mwm finetune …")
    report = json.loads((out / "metrics.json").read_text())
    assert report["test"]["auroc"]["value"] > 0.85
    assert report["test"]["images"] == 12
    assert report["test"]["patients"] == 6
    assert report["images"]["train"] == {"across": 18, "along": 18}
    assert np.sum(report["confusion_test"]) == 12
    assert report["command"] == "mwm finetune …"
    with (out / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 24
    test = [row for row in rows if row["split"] == "test"]
    assert np.mean([row["label"] == row["predicted"] for row in test]) == report["test"]["accuracy"]["value"]
    assert all(abs(float(row["p_along"]) + float(row["p_across"]) - 1) < 1e-4 for row in rows)
    with Image.open(out / "confusion.png") as picture:
        assert picture.size[0] > 100
    assert {p.name for p in out.iterdir()} == {"metrics.json", "predictions.csv", "history.csv", "confusion.png", "roc.png", "calibration.png", "model.json",
                                               "model.safetensors"} | extra


def test_metrics_hold_no_file_names_and_no_patients(run: Path, index: Path, tmp_path: Path) -> None:
    out = finetune(config(run, index, tmp_path / "out", linear_probe=True))
    text = (out / "metrics.json").read_text()
    assert "p01" not in text
    assert "images/" not in text


def test_same_seed_gives_the_same_predictions(run: Path, index: Path, tmp_path: Path) -> None:
    one, two = (finetune(config(run, index, tmp_path / name, epochs=2)) for name in ("one", "two"))
    assert (one / "predictions.csv").read_bytes() == (two / "predictions.csv").read_bytes()


def test_stored_weights_give_the_stored_predictions(run: Path, index: Path, tmp_path: Path) -> None:
    out = finetune(config(run, index, tmp_path / "out", epochs=2))
    data = read_labelled(index)
    encoder = load_encoder(run, num_classes=2)
    encoder.model.load_state_dict(load_file(str(out / "model.safetensors")))
    images = CaseImages(data.of("test"), decode_cases(data.of("test"), encoder.preprocessing)[0], encoder.preprocessing)
    with torch.no_grad():
        chances = torch.softmax(encoder.model.eval()(images.take(torch.arange(len(images)))), 1)
    with (out / "predictions.csv").open() as stream:
        stored = [float(row["p_along"]) for row in csv.DictReader(stream) if row["split"] == "test"]
    assert np.allclose(chances[:, 1].numpy(), stored, atol=1e-4)


def test_test_labels_have_no_influence_on_the_classifier(run: Path, tmp_path: Path) -> None:
    rows = with_splits(rows_with_patients())
    swapped = [row | {"label": {"along": "across", "across": "along"}[row["label"]]} if row["split"] == "test" else row for row in rows]
    first, second = write_index(tmp_path / "a", rows), write_index(tmp_path / "b", rows)
    with second.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(swapped)
    weights = [load_file(str(finetune(config(run, data, tmp_path / name, linear_probe=True)) / "probe.safetensors"))
               for name, data in (("one", first), ("two", second))]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_other_intensity_than_the_run_is_used_and_named(run: Path, index: Path, tmp_path: Path) -> None:
    same = finetune(config(run, index, tmp_path / "same", linear_probe=True, intensity="auto"))
    assert json.loads((same / "metrics.json").read_text())["notes"] == []
    other = finetune(config(run, index, tmp_path / "other", linear_probe=True, intensity="minmax"))
    assert any("intensity is 'minmax' now" in note for note in json.loads((other / "metrics.json").read_text())["notes"])
    assert (same / "predictions.csv").read_text() != (other / "predictions.csv").read_text()


def test_existing_results_are_kept_unless_overwrite(run: Path, index: Path, tmp_path: Path) -> None:
    out = finetune(config(run, index, tmp_path / "out", linear_probe=True))
    before = (out / "metrics.json").read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        finetune(config(run, index, out, linear_probe=True))
    assert (out / "metrics.json").read_bytes() == before
    finetune(config(run, index, out, linear_probe=True, overwrite=True, bootstrap=60))
    assert json.loads((out / "metrics.json").read_text())["config"]["bootstrap"] == 60


def test_folder_that_is_no_result_is_not_overwritten(run: Path, index: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="earlier results"):
        finetune(config(run, index, tmp_path / "thesis", linear_probe=True, overwrite=True))
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_finished_results_of_other_settings_are_not_taken_for_these(run: Path, index: Path, tmp_path: Path) -> None:
    out = finetune(config(run, index, tmp_path / "out", linear_probe=True))
    before = (out / "metrics.json").read_bytes()
    finetune(config(run, index, out, linear_probe=True, resume=True, workers=2))  # not a number changes
    with pytest.raises(TransferError, match="task must be 'classify' as in the finished results"):
        finetune(config(run, index, out, task="segment", resume=True))
    with pytest.raises(TransferError, match=r"label_fraction must be 1\.0 as in the finished results .* got 0\.5"):
        finetune(config(run, index, out, linear_probe=True, label_fraction=0.5, resume=True))
    assert (out / "metrics.json").read_bytes() == before
    (out / "metrics.json").write_text("{")
    with pytest.raises(TransferError, match="must be of a finished run, got a damaged one"):
        finetune(config(run, index, out, linear_probe=True, resume=True))


def test_a_link_leads_to_the_results_and_stays(run: Path, index: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for overwrite in (False, True):
        finetune(config(run, index, tmp_path / "out", linear_probe=True, overwrite=overwrite))
        assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "metrics.json").is_file()


def test_a_folder_that_cannot_be_made_is_refused_before_an_image_is_read(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TransferError, match=r"out must lie in a folder that can be written, got .*file \(Not a directory\)"):
        finetune(config(run, tmp_path / "no data", tmp_path / "file" / "out"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "..", "/"):
        with pytest.raises(TransferError, match="out must be a folder that can be replaced as a whole"):
            finetune(config(run, tmp_path / "no data", Path(out)))
    with pytest.raises(TransferError, match=r"^predict: out must lie in"):
        predict_classes("results", "images", tmp_path / "file" / "answers")


def test_names_that_are_no_utf8_do_not_end_a_run_that_has_trained(run: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, label in ((b"lat\xe9n", "along"), (b"=1+1", "across")):
        folder = tmp_path / "data" / os.fsdecode(name)
        folder.mkdir(parents=True)
        for k in range(6):
            draw(rng, label).save(folder / os.fsdecode(b"\xff%d.png" % k))
    out = finetune(config(run, tmp_path / "data", tmp_path / "out", linear_probe=True))
    with (out / "predictions.csv").open(encoding="utf-8") as stream:
        assert {row["label"] for row in csv.DictReader(stream)} == {"lat\\udce9n", "'=1+1"}
    case = Case(Record(tmp_path, os.fsdecode(b"\xff.png"), 1), 0, "", "test")
    row = {**dict.fromkeys(FIGURES, 1.0), "by_class": [], "pointing": 1.0, "truth_pixels": 1, "predicted_pixels": 1}
    write_predictions(tmp_path / "masks.csv", Labelled((os.fsdecode(b"lat\xe9n"),), (case,), False, ()), MaskClasses(("foreground",)), {"test": [row]})
    assert "\\udcff.png,test,lat\\udce9n" in (tmp_path / "masks.csv").read_text(encoding="utf-8")


def test_layers_near_the_input_learn_slower(run: Path) -> None:
    encoder = load_encoder(run, num_classes=2)
    rates = {id(p): group["lr"] for group in parameter_groups(encoder, 1.0, 0.5, 0.1) for p in group["params"]}
    named = dict(encoder.model.named_parameters())
    assert len(rates) == len(named)
    assert rates[id(named["fc.weight"])] == rates[id(named["layer4.0.conv1.weight"])] == 1.0
    assert rates[id(named["layer3.0.conv1.weight"])] == 0.5
    assert rates[id(named["conv1.0.weight"])] < 0.1


@pytest.mark.parametrize(("change", "words"), [
    ({"task": "paint"}, "task must be classify"), ({"epochs": 0}, "epochs must be at least 1"), ({"val_share": 1.0}, "val_share must be between"),
    ({"crop": 0.0}, "crop must be in"), ({"run": ""}, "run must be"),
])
def test_settings_out_of_range_are_refused_by_name(change: dict, words: str) -> None:
    with pytest.raises(TransferError, match=words):
        FinetuneConfig(**({"run": "r", "data": "d"} | change))


def test_folder_without_an_encoder_is_refused_in_one_sentence(index: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"encoder\.safetensors") as caught:
        finetune(config(tmp_path / "empty", index, tmp_path / "out"))
    assert "\n" not in str(caught.value)


def test_unreadable_file_is_left_out_and_listed_or_fatal_with_strict(run: Path, index: Path, tmp_path: Path) -> None:
    (index.parent / "images" / "p00_0.png").write_bytes(b"no image")
    out = finetune(config(run, index, tmp_path / "out", linear_probe=True))
    assert "p00_0.png" in (out / "skipped.csv").read_text()
    assert sum(json.loads((out / "metrics.json").read_text())["images"]["train"].values()) == 35
    with pytest.raises(ValueError, match=r"p00_0\.png"):
        finetune(config(run, index, tmp_path / "strict", linear_probe=True, strict=True))
    assert not (tmp_path / "strict").exists()
