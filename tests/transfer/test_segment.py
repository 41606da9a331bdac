"""Drawn shapes are found, the figures are those of the files, results are whole, and bad data get one sentence."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_masks import masked_rows, write_rows
from PIL import Image

from mwm import view
from mwm.data import ReadSettings, Record
from mwm.transfer import FinetuneConfig, TransferError, finetune
from mwm.transfer.labelled import Case
from mwm.transfer.mask_metrics import dice, image_figures
from mwm.transfer.segment import mask_loss
from mwm.transfer.segment_predict import predict_masks
from mwm.transfer.segment_results import HeldLabels, overlay_gallery


def config(run: Path | None, data: Path, out: Path, **changes) -> FinetuneConfig:
    return FinetuneConfig(**({"run": run and str(run), "data": str(data), "out": str(out), "task": "segment", "progress": False, "bootstrap": 50, "epochs": 12,
                              "batch_size": 12, "lr": 3e-3, "layer_decay": 1.0, "head_width": 16, "device": "cpu", "allow_leak": True} | changes))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Images of 32 pixels gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_rows(folder, masked_rows(folder))


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough to run, not to learn."""
    folder = tmp_path_factory.mktemp("few")
    return write_rows(folder, masked_rows(folder, patients=10, images=2))


@pytest.fixture(scope="module")
def results(run: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One trained network for several tests."""
    return finetune(config(run, data, tmp_path_factory.mktemp("results") / "out"), command="mwm finetune …")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def test_rows_of_the_gallery_say_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, list[str]]] = []
    add = view.Sheet.add
    monkeypatch.setattr(view.Sheet, "add", lambda sheet, label, *cells: (said.append((label, [cell.caption for cell in cells])), add(sheet, label, *cells))[1])
    rng, cases, rows = np.random.default_rng(0), [], []
    for k in range(9):
        Image.fromarray(rng.integers(0, 256, (20, 24), np.uint8)).save(tmp_path / f"{k}.png")
        truth, predicted = np.zeros((20, 24), np.uint8), np.zeros((20, 24), np.uint8)
        truth[4:14, 4:14] = predicted[4 : 14 - k, 4:14] = 1
        cases.append(Case(Record(tmp_path / f"{k}.png", f"{k}.png", k), -1, "", "test"))
        rows.append(image_figures(truth, predicted, 1, tolerance=2.0) | {"truth_pixels": int(truth.sum()), "predicted_pixels": int(predicted.sum()),
                                                                         "truth": HeldLabels.of(truth), "predicted": HeldLabels.of(predicted)})
        assert np.array_equal(rows[-1]["predicted"].labels(), predicted)
    overlay_gallery(cases, rows, ReadSettings(), unit="pixels", columns=3)
    assert [label for label, _ in said] == ["Best of 9 (turquoise: truth, orange: prediction)", "Median of 9", "Worst of 9"]
    assert [float(caption.split()[1].rstrip(",")) for _, captions in said for caption in captions] == [round(row["dice"], 2) for row in rows]


def test_drawn_shapes_are_found_and_results_are_complete(results: Path) -> None:
    report = json.loads((results / "metrics.json").read_text())
    assert report["test"]["dice"]["value"] > 0.75
    assert report["test"]["dice"]["low"] <= report["test"]["dice"]["value"] <= report["test"]["dice"]["high"]
    assert (report["test"]["images"], report["test"]["patients"]) == (12, 3)
    assert report["classes"] == ["foreground"]
    assert report["hd95_unit"] == "pixels"
    assert {p.name for p in results.iterdir()} == {"metrics.json", "predictions.csv", "history.csv", "overlays.png", "model.json", "model.safetensors"}
    rows = rows_of(results / "predictions.csv")
    assert len(rows) == 24
    assert np.mean([float(row["dice"]) for row in rows if row["split"] == "test"]) == pytest.approx(report["test"]["dice"]["value"], abs=1e-6)
    with Image.open(results / "overlays.png") as picture:
        assert picture.size[0] > 600


def test_metrics_hold_no_file_names_and_no_patients(results: Path) -> None:
    text = (results / "metrics.json").read_text()
    assert "p04" not in text
    assert "images/" not in text


def test_written_masks_have_the_figures_of_the_training_report(results: Path, data: Path, tmp_path: Path) -> None:
    out = predict_masks(results, data, tmp_path / "out", split="test", probabilities=True, device="cpu", progress=False)
    stored = {row["file"]: float(row["dice"]) for row in rows_of(results / "predictions.csv") if row["split"] == "test"}
    rows = rows_of(out / "predictions.csv")
    assert {row["file"] for row in rows} == set(stored)
    for row in rows:
        truth = np.asarray(Image.open(data.parent / row["file"].replace("images", "masks"))) > 0
        mask = np.asarray(Image.open(out / row["mask"]))
        assert set(np.unique(mask)) <= {0, 255}
        assert dice(truth, mask > 0) == pytest.approx(stored[row["file"]], abs=0.02)
        assert int(row["pixels_foreground"]) == (mask > 0).sum()
        chances = np.asarray(Image.open(out / row["mask"].replace("masks", "probabilities", 1)))
        assert ((chances >= 128) == (mask > 0)).mean() > 0.99


def test_weights_load_into_a_plain_timm_network(results: Path) -> None:
    import timm
    from safetensors.torch import load_file

    weights = load_file(str(results / "model.safetensors"))
    plain = timm.create_model("resnet10t", features_only=True, in_chans=1)
    plain.load_state_dict({key.removeprefix("encoder."): value for key, value in weights.items() if key.startswith("encoder.")})


def test_same_seed_gives_the_same_figures(run: Path, few: Path, tmp_path: Path) -> None:
    one, two = (finetune(config(run, few, tmp_path / name, epochs=1, flip=True)) for name in ("one", "two"))
    assert (one / "predictions.csv").read_bytes() == (two / "predictions.csv").read_bytes()


def test_interrupted_run_reaches_the_same_figures(run: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import functools

    from mwm.transfer import fit, segment

    monkeypatch.setattr(segment, "fit", functools.partial(fit.fit, checkpoint_seconds=0))
    whole = finetune(config(run, few, tmp_path / "whole", epochs=3))
    judge, calls = segment._judge, []

    def killed(*arguments) -> dict:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return judge(*arguments)

    monkeypatch.setattr(segment, "_judge", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune(config(run, few, tmp_path / "cut", epochs=3))
    assert not (tmp_path / "cut").exists()
    cut = finetune(config(run, few, tmp_path / "cut", epochs=3, resume=True))
    assert len(calls) == 4
    assert (cut / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]


def test_named_values_make_classes_and_come_out_again(run: Path, tmp_path: Path) -> None:
    index = write_rows(tmp_path / "data", masked_rows(tmp_path / "data", patients=10, values=(100, 200)))
    out = finetune(config(run, index, tmp_path / "out", mask_values="100=disc,200=square", precision="bf16", epochs=20))
    report = json.loads((out / "metrics.json").read_text())
    assert report["classes"] == ["disc", "square"]
    assert set(report["test"]["by_class"]) == {"disc", "square"}
    assert report["test"]["by_class"]["disc"]["value"] > 0.5
    masks = predict_masks(out, index, tmp_path / "masks", split="test", probabilities=True, device="cpu", progress=False)
    values = set().union(*(np.unique(np.asarray(Image.open(masks / row["mask"]))).tolist() for row in rows_of(masks / "predictions.csv")))
    assert 100 in values
    assert values <= {0, 100, 200}
    assert (masks / "probabilities" / "images" / "p04_0_disc.png").is_file()
    assert json.loads((masks / "masks.json").read_text())["png"] == {"disc": 100, "square": 200}


def test_labels_make_classes_where_asked(run: Path, few: Path, tmp_path: Path) -> None:
    out = finetune(config(run, few, tmp_path / "out", epochs=1, mask_per_label=True))
    assert json.loads((out / "metrics.json").read_text())["classes"] == ["disc", "square"]


def test_random_weights_without_a_run_and_a_share_of_labels(few: Path, tmp_path: Path) -> None:
    out = finetune(config(None, few, tmp_path / "out", encoder="torchvision/resnet18", image_size=32, init="scratch", epochs=1, label_fraction=0.4, store_weights=False))
    report = json.loads((out / "metrics.json").read_text())
    assert report["patients"]["train"] < 6
    assert any("label_fraction" in note for note in report["notes"])
    assert not (out / "model.safetensors").exists()


def test_test_masks_have_no_influence_on_the_network(run: Path, few: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    rows = masked_rows(tmp_path / "other", patients=10, images=2)
    for row in rows:
        if row["split"] == "test":
            Image.fromarray(np.full((32, 32), 255, np.uint8)).save(tmp_path / "other" / row["mask"])
    weights = [load_file(str(finetune(config(run, index, tmp_path / name, epochs=1)) / "model.safetensors"))
               for name, index in (("one", few), ("two", write_rows(tmp_path / "other", rows)))]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_loss_is_that_computed_by_hand_and_falls_to_zero_for_a_perfect_answer() -> None:
    labels = torch.tensor([[[0, 1], [1, 0]]])
    even = torch.zeros(1, 2, 2, 2)  # p = 1/2 everywhere: overlap 1, sum 4
    assert mask_loss(even, labels).item() == pytest.approx(np.log(2) + 1 - (2 * 1 + 1) / (4 + 1))
    sure = 40 * torch.nn.functional.one_hot(labels, 2).permute(0, 3, 1, 2).float()
    assert mask_loss(sure, labels).item() == pytest.approx(0, abs=1e-6)


def test_loss_that_is_not_finite_ends_in_one_sentence(run: Path, few: Path, tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="loss must be finite") as caught:
        finetune(config(run, few, tmp_path / "out", epochs=2, lr=1e18))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
