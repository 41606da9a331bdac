"""Leaks between splits are refused or noted, shares of labels are noted, and both hold for a whole fine-tuning run."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from drawn import rows_with_patients, with_splits, write_index
from PIL import Image

from mwm.data import ReadSettings, read_image
from mwm.data.signature import look_alikes, signature
from mwm.transfer import FinetuneConfig, TransferError, finetune
from mwm.transfer.prepare import prepare


def settings(run: Path, data: Path, **changes) -> FinetuneConfig:
    return FinetuneConfig(**({"run": str(run), "data": str(data), "progress": False, "bootstrap": 20, "device": "cpu", "batch_size": 12, "linear_probe": True} | changes))


def name_of(index: Path, split: str, number: int = 0) -> Path:
    with index.open() as stream:
        return index.parent / [row["file"] for row in csv.DictReader(stream) if row["split"] == split][number]


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_recompressed_copy_in_another_split_is_refused_unless_allowed(run: Path, index: Path, tmp_path: Path, split: str) -> None:
    with Image.open(name_of(index, "train")) as picture:
        picture.resize((40, 40), Image.Resampling.BICUBIC).resize((32, 32)).save(name_of(index, split))
    with pytest.raises(TransferError, match=rf"images of two splits must differ, got 1 near-identical pairs .* in train, .* in {split}\).*--allow-leak"):
        finetune(settings(run, index, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    out = finetune(settings(run, index, out=str(tmp_path / "out"), allow_leak=True))
    text = (out / "metrics.json").read_text()
    assert any("LEAK allowed: 1 pairs of near-identical images" in note for note in json.loads(text)["notes"])
    assert name_of(index, "train").name not in text


def test_alike_images_of_one_split_are_no_leak(run: Path, index: Path) -> None:
    name_of(index, "train", 5).write_bytes(name_of(index, "train").read_bytes())
    assert not any("LEAK" in note for note in prepare(settings(run, index)).data.notes)


def test_borders_of_padded_images_are_no_leak(run: Path, tmp_path: Path) -> None:
    index = write_index(tmp_path, with_splits(rows_with_patients()))
    rng = np.random.default_rng(0)
    for file in (tmp_path / "images").iterdir():  # wide and bright: padded to a square, the edge of the border is stronger than what it holds
        Image.fromarray(np.clip(np.kron(rng.normal(225, 6, (4, 10)), np.ones((6, 6))), 0, 255).astype(np.uint8)).save(file)
    data = prepare(settings(run, index)).data
    padded = np.stack([signature(read_image(case.record, ReadSettings(size=(32, 32)), channels=1)) for case in data.cases])
    assert look_alikes(padded, [case.patient for case in data.cases], [case.split for case in data.cases])


def test_a_share_of_the_labels_leaves_val_and_test_whole_and_is_noted(run: Path, tmp_path: Path) -> None:
    index = write_index(tmp_path / "data", with_splits(rows_with_patients(60)))
    whole, part = prepare(settings(run, index)).data, prepare(settings(run, index, label_fraction=0.25)).data
    assert {split: len(part.of(split)) for split in ("train", "val", "test")} == {"train": 16, "val": 24, "test": 24}
    assert (len(whole.of("train")), part.of("test")) == (72, whole.of("test"))
    assert any("Labels of 8 of 36 training patients are used (label_fraction 0.25, seed 0)" in note for note in part.notes)


def test_the_share_is_the_same_for_every_first_weight(run: Path, index: Path) -> None:
    one = prepare(settings(run, index, label_fraction=0.3)).data
    two = prepare(FinetuneConfig(data=str(index), encoder="resnet10t", init="scratch", image_size=32, out="out", progress=False, label_fraction=0.3)).data
    assert [case.record.name for case in one.of("train")] == [case.record.name for case in two.of("train")]


def test_a_probe_of_few_labels_is_not_fitted_to_the_whole_val_split(run: Path, tmp_path: Path) -> None:
    """Else ten labels would be measured as ten and all of val."""
    from safetensors.torch import load_file

    rows = with_splits(rows_with_patients())
    index = write_index(tmp_path / "data", rows)
    first = finetune(settings(run, index, out=str(tmp_path / "a"), label_fraction=0.5))
    for row in rows:  # other val labels of the same images can move C, and only C
        if row["split"] == "val":
            row["label"] = {"along": "across", "across": "along"}[row["label"]]
    with index.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    second = finetune(settings(run, index, out=str(tmp_path / "b"), label_fraction=0.5))
    means = [load_file(str(out / "probe.safetensors"))["mean"] for out in (first, second)]
    assert (means[0] == means[1]).all()
    full = load_file(str(finetune(settings(run, index, out=str(tmp_path / "c"))) / "probe.safetensors"))["mean"]
    assert not (full == means[0]).all()


def test_a_killed_run_goes_on_and_a_finished_one_is_left_alone(run: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mwm.transfer.classify as classify
    from mwm.transfer import fit as fit_module
    from mwm.transfer.fit import fit

    monkeypatch.setattr(classify, "fit", lambda *a, **k: fit(*a, **k, checkpoint_seconds=0))
    whole = finetune(settings(run, index, out=str(tmp_path / "whole"), linear_probe=False, epochs=3))
    saves, save = [], fit_module.checkpoint.save

    def dies(path: Path, state: dict) -> None:
        save(path, state)
        saves.append(path)
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(fit_module.checkpoint, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        finetune(settings(run, index, out=str(tmp_path / "out"), linear_probe=False, epochs=3))
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.state").is_file()
    out = finetune(settings(run, index, out=str(tmp_path / "out"), linear_probe=False, epochs=3, resume=True))
    assert len(saves) == 3  # one epoch was left
    assert (out / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()
    assert not (tmp_path / ".out.state").exists()
    before = (out / "metrics.json").read_bytes()
    assert finetune(settings(run, index, out=str(tmp_path / "out"), linear_probe=False, epochs=3, resume=True)) == out
    assert (out / "metrics.json").read_bytes() == before


def test_weights_are_left_out_where_they_are_not_wanted(run: Path, index: Path, tmp_path: Path) -> None:
    out = finetune(settings(run, index, out=str(tmp_path / "out"), store_weights=False))
    assert not list(out.glob("*.safetensors"))
    assert json.loads((out / "model.json").read_text())["weights"] is None


@pytest.mark.parametrize("task", ["classify", "segment", "detect"])
def test_images_beyond_the_memory_are_refused_before_one_is_read(task: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row | {"mask": row["file"]} for row in with_splits(rows_with_patients())]
    index = write_index(tmp_path, rows)
    monkeypatch.setattr("mwm.transfer.images.available_bytes", lambda: 60 * 2 * 32 * 32 - 1)
    for row in rows:
        (tmp_path / row["file"]).write_bytes(b"not read")
    with pytest.raises(TransferError, match="the 60 decoded images must fit into memory"):
        finetune(FinetuneConfig(run=str(run), data=str(index), task=task, out=str(tmp_path / "out"), strict=True, progress=False, device="cpu"))
