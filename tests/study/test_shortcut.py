"""The shortcut row sees brightness and size, and nothing of the structure; it answers every test image once."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mwm.data import Record
from mwm.study.errors import StudyError
from mwm.study.folds import write_folds
from mwm.study.shortcut import features, shortcut, write_shortcut
from mwm.study.statistics import estimate


def _data(folder: Path, picture) -> Path:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    with (folder / "index.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "split", "label", "patient"])
        for k, label in enumerate(("dark", "light")):
            for p in range(8):
                for i in range(3):
                    name = f"{label}{p}_{i}.png"
                    Image.fromarray(picture(generator, k)).save(folder / name)
                    writer.writerow([name, "train", label, f"{label}{p}"])
    return folder / "index.csv"


def _bright(generator: np.random.Generator, k: int) -> np.ndarray:
    return np.uint8(np.clip(generator.normal(90 + 60 * k, 20, (20, 24)), 0, 255))


def _structure(generator: np.random.Generator, k: int) -> np.ndarray:
    """Class 0 has its bright square left, class 1 right; the five features are the same but for noise."""
    image = generator.normal(60, 5, (20, 24))
    image[8:12, (4, 16)[k] : (8, 20)[k]] += 100
    return np.uint8(np.clip(image, 0, 255))


def test_features_equal_the_hand_computation(tmp_path: Path) -> None:
    values = np.full((20, 40), 51, dtype=np.uint8)
    values[1:-1, 1:-1] = 102
    Image.fromarray(values).save(tmp_path / "a.png")
    found = features(Record(tmp_path / "a.png", "a.png", 0))
    inner = 18 * 38 / 800
    mean = 0.2 * (1 - inner) + 0.4 * inner
    np.testing.assert_allclose(found, [40, 20, mean, np.sqrt((1 - inner) * (0.2 - mean) ** 2 + inner * (0.4 - mean) ** 2), 0.2], atol=1e-6)


def test_brightness_is_found_and_structure_is_not(tmp_path: Path) -> None:
    bright = shortcut(write_folds(_data(tmp_path / "bright", _bright), tmp_path / "out", merge_alike=False).paths)
    assert len(bright.answers.file) == 48 and bright.classes == ("dark", "light")
    assert estimate(bright.answers, "auroc", rounds=100).value > 0.95
    hidden = shortcut(write_folds(_data(tmp_path / "structure", _structure), tmp_path / "out", merge_alike=False).paths)
    assert 0.2 < estimate(hidden.answers, "auroc", rounds=100).value < 0.8
    with write_shortcut(bright, tmp_path / "shortcut.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 48 and set(rows[0]) == {"file", "fold", "split", "label", "predicted", "p_dark", "p_light"}


def test_folds_of_other_classes_are_refused(tmp_path: Path) -> None:
    first = write_folds(_data(tmp_path / "a", _bright), tmp_path / "out", merge_alike=False).paths[0]
    other = tmp_path / "out" / "folds" / "a" / "other.csv"
    other.write_text(first.read_text().replace(",dark,", ",grey,"))
    with pytest.raises(StudyError, match="same classes"):
        shortcut([first, other])


def test_an_image_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    """It had ended the report of a study whose cells, which leave it out, were all done."""
    index = _data(tmp_path / "bright", _bright)
    (index.parent / "dark3_1.png").write_bytes(b"no picture")
    found = shortcut(write_folds(index, tmp_path / "out", merge_alike=False).paths)
    assert len(found.answers.file) == 47 and "dark3_1.png" not in found.answers.file
