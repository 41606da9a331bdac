"""Volumes are segmented slice by slice and come back as NIfTI on the source's voxels; other files as PNG of their own size."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from mwm.data import read_list
from mwm.train import load_encoder
from mwm.transfer import TransferError
from mwm.transfer.pyramid import mask_network
from mwm.transfer.segment_masks import MaskClasses
from mwm.transfer.segment_predict import Segmenter, predict_masks
from mwm.transfer.segment_results import plain_names
from mwm.transfer.stored import StoredModel, write_model


@pytest.fixture
def bright(run: Path, tmp_path: Path) -> Path:
    """Results whose network is replaced, in the test, by a threshold at one half of the grey values."""
    encoder = load_encoder(run)
    network = mask_network(encoder, 2, width=8)
    folder = tmp_path / "results"
    folder.mkdir()
    facts = {"mask_classes": json.loads(MaskClasses(("foreground",)).to_json()), "head_width": 8, "head_norm": "group"}
    write_model(folder, StoredModel("segment", "mask head", encoder.name, ("foreground",), encoder.preprocessing, facts), plain_names(network.state_dict()))
    return folder


@pytest.fixture
def threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    from mwm.transfer.pyramid import SegmentationNetwork

    def forward(_self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([-40 * images, 40 * images], 1)  # normalised with mean 0.5

    monkeypatch.setattr(SegmentationNetwork, "forward", forward)


def volume(path: Path, affine: np.ndarray, shape: tuple[int, int, int] = (40, 36, 5)) -> np.ndarray:
    """A bright block in one corner, so that no turn leaves it in place."""
    values = np.full(shape, 10, np.int16)
    values[4:20, 22:32, 1:3] = 1000
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return values > 500


@pytest.mark.parametrize("affine", [np.diag([1.0, 1.0, 3.0, 1.0]), np.diag([-1.0, 1.0, 3.0, 1.0]), np.array([[0, -1.0, 0, 9], [1.0, 0, 0, 2], [0, 0, -3.0, 0], [0, 0, 0, 1.0]])])
def test_masks_of_a_volume_lie_on_its_voxels(affine: np.ndarray, bright: Path, threshold: None, tmp_path: Path) -> None:
    truth = volume(tmp_path / "in" / "scan.nii.gz", affine)
    out = predict_masks(bright, tmp_path / "in", tmp_path / "out", probabilities=True, device="cpu", progress=False)
    made = nibabel.load(out / "masks" / "scan.nii.gz")
    values = np.asanyarray(made.dataobj)
    assert values.shape == truth.shape
    assert values.dtype == np.uint8
    assert set(np.unique(values)) == {0, 1}
    assert np.allclose(made.affine, affine)
    assert 2 * (truth & (values > 0)).sum() / (truth.sum() + values.sum()) > 0.9
    chances = np.asanyarray(nibabel.load(out / "probabilities" / "scan.nii.gz").dataobj)
    assert chances.dtype == np.float32
    assert np.array_equal(chances > 0.5, values > 0)
    with (out / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["file"] for row in rows] == [f"scan.nii.gz#z{k}" for k in range(5)]
    assert sum(int(row["pixels_foreground"]) for row in rows) == values.sum()


def test_pictures_become_png_of_their_own_size_and_equal_stems_stay_apart(bright: Path, threshold: None, tmp_path: Path) -> None:
    for name, size in (("a.png", (50, 20)), ("a.jpg", (20, 50)), ("b/c.png", (33, 33))):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        picture = np.zeros(size[::-1], np.uint8)
        picture[:, : size[0] // 2] = 255
        Image.fromarray(picture).save(tmp_path / "in" / name, quality=95)
    (tmp_path / "in" / "broken.png").write_bytes(b"nothing")
    out = predict_masks(bright, tmp_path / "in", tmp_path / "out", device="cpu", progress=False, batch_size=2)
    found = {p.relative_to(out).as_posix(): Image.open(p) for p in (out / "masks").rglob("*.png")}
    assert {name: picture.size for name, picture in found.items()} == {"masks/a.png": (20, 50), "masks/a.png.png": (50, 20), "masks/b/c.png": (33, 33)}
    for picture in found.values():
        half = picture.size[0] // 2
        assert (np.asarray(picture)[:, : half - 1] == 255).mean() > 0.95
        assert (np.asarray(picture)[:, half + 2 :] == 0).mean() > 0.95
    assert "broken.png" in (out / "skipped.csv").read_text()


def test_records_give_labels_and_probabilities_in_python(bright: Path, threshold: None, tmp_path: Path) -> None:
    volume(tmp_path / "in" / "scan.nii", np.eye(4))
    answers = list(Segmenter(bright, "cpu")(read_list(tmp_path / "in"), batch_size=2))
    assert len(answers) == 5
    labels, chances = answers[1]
    assert labels.shape == (36, 40)
    assert chances.shape == (2, 36, 40)
    assert np.allclose(chances.sum(0), 1, atol=1e-5)
    assert np.array_equal(labels, chances.argmax(0))


def test_folders_that_hold_no_such_network_are_refused_in_one_sentence(bright: Path, tmp_path: Path) -> None:
    stored = (bright / "model.json").read_text()
    for name, text in (("empty", None), ("broken", "{"), ("other", stored.replace('"segment"', '"classify"')), ("grown", stored.replace('"head_width": 8', '"head_width": 16'))):
        shutil.copytree(bright, tmp_path / name)
        (tmp_path / name / "model.json").unlink()
        if text is not None:
            (tmp_path / name / "model.json").write_text(text)
        with pytest.raises(TransferError, match="predict: ") as caught:
            Segmenter(tmp_path / name, "cpu")
        assert "\n" not in str(caught.value)


def test_trained_network_is_never_overwritten_by_its_masks(bright: Path, tmp_path: Path) -> None:
    (bright / "metrics.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds a trained model"):
        predict_masks(bright, tmp_path, bright, overwrite=True, device="cpu", progress=False)
    assert (bright / "model.safetensors").is_file()


def test_nothing_is_written_where_nothing_can_be_read(bright: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.png").write_bytes(b"nothing")
    with pytest.raises(TransferError, match="readable images"):
        predict_masks(bright, tmp_path / "in", tmp_path / "out", device="cpu", progress=False)
    assert not (tmp_path / "out").exists()
