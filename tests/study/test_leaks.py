"""Near-identical images are found across patients, kept together by the folds, and refused where a split shares them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from mwm.data import ReadSettings
from mwm.data.signature import NEAR_IDENTICAL, look_alikes, signature
from mwm.study.errors import StudyError
from mwm.study.folds import write_folds
from mwm.study.leaks import check_folds, find_leaks


def _picture(seed: int, edge: int = 96) -> Image.Image:
    """Smooth noise: two seeds correlate at about 0."""
    values = gaussian_filter(np.random.default_rng(seed).standard_normal((edge, edge)), 3)
    return Image.fromarray(np.uint8(255 * (values - values.min()) / np.ptp(values)))


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue()))


def _of(image: Image.Image) -> np.ndarray:
    return signature(torch.from_numpy(np.asarray(image, dtype=np.float32) / 255))


def _data(folder: Path, images: list[tuple[str, str, str, str, Image.Image]]) -> Path:
    """images: (file, split, label, patient, picture)."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "index.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "split", "label", "patient"])
        for name, split, label, patient, picture in images:
            writer.writerow([name, split, label, patient])
            picture.save(folder / name)
    return folder / "index.csv"


def _clean(patients: int = 6) -> list[tuple[str, str, str, str, Image.Image]]:
    return [(f"{label}{p}.png", "train" if p else "test", label, f"{label}{p}", _picture(10 * p + k)) for k, label in enumerate("ab") for p in range(patients)]


@pytest.mark.parametrize("change", [lambda i: _jpeg(i, 40), lambda i: i.resize((48, 48)), lambda i: i.point(lambda v: int((v / 255) ** 0.7 * 255)),
                                    lambda i: i.convert("RGB").convert("L")])
def test_copies_are_near_identical_and_other_pictures_are_not(change) -> None:
    original, other = _of(_picture(0)), _of(_picture(1))
    copy = _of(change(_picture(0)))
    assert original @ copy > NEAR_IDENTICAL > 0.5 > other @ copy


def test_blank_images_are_like_nothing() -> None:
    blank = _of(Image.new("L", (50, 50), 128))
    assert not blank.any() and look_alikes(np.stack([blank, blank]), ["p", "q"]) == []


def test_pairs_equal_brute_force_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mwm.data.signature._BLOCK", 7)
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((40, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    groups, sides = [f"g{k}" for k in generator.integers(0, 9, 40)], [f"s{k}" for k in generator.integers(0, 2, 40)]
    for side in (None, sides):
        found = {(p.first, p.second) for p in look_alikes(vectors, groups, side, threshold=0.6)}
        wanted = {(i, j) for i in range(40) for j in range(i + 1, 40) if groups[i] != groups[j] and (side is None or side[i] != side[j])
                  and float(vectors[i] @ vectors[j]) >= 0.6}
        assert found == wanted and wanted


def test_a_copy_under_another_patient_leaks_and_slices_of_one_patient_do_not(tmp_path: Path) -> None:
    own = ("same.png", "train", "a", "a1", _jpeg(_picture(10), 50))
    assert not find_leaks(_data(tmp_path / "clean", [*_clean(), own]))
    path = _data(tmp_path / "leak", [*_clean(), ("copy.png", "train", "a", "new", _jpeg(_picture(0), 50))])
    found = find_leaks(path)
    assert [pair[:4] for pair in found.pairs] == [("a0.png", "test", "copy.png", "train")] and not found.patients
    with pytest.raises(StudyError, match=r"near-identical images must be in one split.*one name, or pass allow_leak=True"):
        check_folds([path])
    assert check_folds([path], allow_leak=True) == [found]


def test_unlabelled_images_count_as_training(tmp_path: Path) -> None:
    copy = _jpeg(_picture(0), 50)
    assert find_leaks(_data(tmp_path / "test", [*_clean(), ("copy.png", "unlabelled", "", "new", copy)])).pairs
    assert not find_leaks(_data(tmp_path / "train", [*_clean(), ("copy.png", "unlabelled", "", "new", _jpeg(_picture(10), 50))]))


def test_a_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    path = _data(tmp_path, [*_clean(), ("more.png", "test", "a", "a1", _picture(99))])
    with pytest.raises(StudyError, match=r"a patient must be in one split only, got 1 .*pass allow_leak=True"):
        check_folds([path])


def test_folds_keep_look_alikes_of_two_patients_together(tmp_path: Path) -> None:
    rows = [*_clean(7), ("copy.png", "train", "b", "b9", _jpeg(_picture(10), 60))]  # looks like a1, in the other class
    folds = write_folds(_data(tmp_path / "data", rows), tmp_path / "out", folds=5)
    assert folds.merged == 2
    check_folds(folds.paths)
    for path in folds.paths:
        with path.open(newline="") as file:
            held = [row for row in csv.DictReader(file) if row["file"] in ("a1.png", "copy.png")]
        assert len({row["split"] for row in held}) == 1 and {row["patient"] for row in held} == {"a1+b9"}
    assert "copy.png" in (folds.paths[0].parent / "leaks.csv").read_text()
    apart = write_folds(tmp_path / "data", tmp_path / "apart", folds=5, merge_alike=False)
    assert apart.merged == 0


def test_images_are_compared_as_the_tasks_read_them(tmp_path: Path) -> None:
    """Alike in the window that is learnt from, and unlike above it: the tasks would refuse folds that part them."""
    generator = np.random.default_rng(5)
    faint = np.kron(generator.integers(0, 2, (8, 8)), np.ones((8, 8))).astype(bool)
    rows = _clean(7)
    for name, label, patient in (("one.png", "a", "a8"), ("other.png", "b", "b8")):
        rows.append((name, "train", label, patient, Image.fromarray(np.where(faint, 170, np.kron(generator.integers(200, 256, (16, 16)), np.ones((4, 4)))).astype(np.uint8))))
    index = _data(tmp_path / "data", rows)
    assert write_folds(index, tmp_path / "plain").merged == 0
    assert write_folds(index, tmp_path / "window", read=ReadSettings(intensity="window=100,200")).merged == 2
