"""`mwm finetune` without a run, `mwm predict`, and their refusals in one sentence."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from mwm.cli import main
from mwm.transfer import FinetuneConfig, PredictConfig, TransferError
from mwm.transfer.config import DEFAULTS
from mwm.transfer.detect_results import summary as detect_summary
from mwm.transfer.mask_metrics import mask_summary
from mwm.transfer.segment_results import summary_text

QUIET = ("--no-progress", "--device", "cpu", "--bootstrap", "20")


def test_scratch_network_is_trained_and_predicts(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, answers = tmp_path / "out", tmp_path / "answers"
    assert main(["finetune", str(index), "--init", "scratch", "--encoder", "resnet10t", "--image-size", "32", "--epochs", "1", "--out", str(out), *QUIET]) == 0
    report = json.loads((out / "metrics.json").read_text())
    assert (report["config"]["run"], report["encoder"]) == (None, "resnet10t")
    assert any("random (seed 0)" in note for note in report["notes"])
    assert "balanced accuracy" in capsys.readouterr().out
    assert main(["predict", str(out), str(index), "--split", "test", "--out", str(answers), "--no-progress", "--device", "cpu"]) == 0
    assert str(answers) in capsys.readouterr().out
    with (answers / "predictions.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 12


@pytest.mark.parametrize(("words", "part"), [
    (("predict", "nowhere", "images", "--out", "answers"), "must be a folder that mwm finetune wrote"),
    (("predict",), "results must be"),
    (("predict", "results", "images"), "out must be a folder for the answers (--out FOLDER)"),
    (("finetune", "data", "--init", "scratch", "--out", "out"), "encoder must be the name of a network"),
    (("finetune", "data", "--encoder", "resnet10t", "--out", "out"), "init must be scratch"),
    (("finetune", "run", "data", "--knn", "--linear-probe"), "knn must be left out"),
    (("finetune", "run", "data", "--task", "segment", "--knn"), "knn must be left out of task segment"),
    (("finetune", "run", "data", "--label-fraction", "1.5"), "label_fraction must be in (0, 1]"),
    (("finetune", "run", "data", "--precision", "fp8"), "precision must be fp32 | bf16 | fp16"),
    (("finetune", "run", "data", "--resume", "--overwrite"), "resume must be left out"),
])
def test_bad_words_end_in_one_sentence(words: tuple[str, ...], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(list(words)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mwm: ")]
    assert len(lines) == 1 and part in lines[0]


def test_figures_of_nothing_found_say_what_to_look_at() -> None:
    figure = {"value": 0.0, "low": 0.0, "high": 0.0}
    rows = [{"dice": 0.0, "iou": 0.0, "nsd": 0.0, "hd95": 9.0, "pointing": 0.0, "truth_pixels": 5, "predicted_pixels": 0}] * 2
    nothing = {**mask_summary(rows, ["foreground"], ["a", "b"], rounds=5), "positives": 2, "images": 2}
    assert "nothing was found in any image: history.csv" in summary_text(nothing, unit="pixels", tolerance=2.0)
    assert "nothing was found" not in summary_text(nothing | {"dice_positive": figure | {"value": 0.1}}, unit="pixels", tolerance=2.0)
    boxes = {"images": 2, "objects": 2, "patients": 2, "box_ap": figure, "box_ap50": figure}
    assert "no object was found with half an overlap" in detect_summary(boxes) and "no object" not in detect_summary(boxes | {"box_ap50": figure | {"value": 0.2}})


def test_each_task_has_its_own_defaults_and_given_values_win() -> None:
    for task, values in DEFAULTS.items():
        config = FinetuneConfig(run="r", data="d", task=task)
        assert {name: getattr(config, name) for name in values} == values
    assert FinetuneConfig(run="r", data="d", task="detect", epochs=3).epochs == 3


@pytest.mark.parametrize(("change", "message"), [
    ({"epochs": "ten"}, "epochs must be a whole number or None, got 'ten'"),
    ({"epochs": 2.5}, "epochs must be a whole number or None, got 2.5"),
    ({"lr": "1e-3"}, "lr must be a number or None"),
    ({"flip": "no"}, "flip must be true or false, got 'no'"),
    ({"seed": True}, "seed must be a whole number"),
    ({"labels": ["a", "b"]}, "labels must be a text or None"),
])
def test_a_value_of_another_kind_is_refused_by_the_name_of_its_field(change: dict, message: str) -> None:
    with pytest.raises(TransferError, match=message):
        FinetuneConfig(run="r", data="d", **change)
    assert FinetuneConfig(run=Path("r"), data="d", epochs=np.int64(3), lr=1, crop=np.float32(0.5)).lr == 1
    with pytest.raises(TransferError, match="predict: batch_size must be a whole number, got '8'"):
        PredictConfig(results="r", images="i", out="o", batch_size="8")
