"""The arm `shuffled` cuts the bond between an image and its region, and nothing else."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # import-mode importlib does not; drawn_regions.py is shared
from drawn_regions import write_set

from mwm.data import DataError, PretrainDataset, ReadSettings, Record, open_regions, read_list
from mwm.study.shuffle import derange, shuffle_regions


def records(sizes: dict[str, int], split: str = "train", label: str = "a") -> list[Record]:
    return [Record(Path("x"), f"{label}/{patient}/{k}", 0, split=split, label=label, patient=patient) for patient, n in sizes.items() for k in range(n)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [{"a": 1, "b": 1}, {"a": 3, "b": 3}, {"a": 5, "b": 1, "c": 1, "d": 3}, {"a": 10, "b": 4, "c": 3, "d": 3}, {str(k): 1 for k in range(30)}])
def test_every_region_is_given_once_and_to_another_patient(sizes: dict[str, int], seed: int) -> None:
    rows = records(sizes) + records(sizes, label="b") + records(sizes, split="val")
    donors = derange(rows, seed)
    assert sorted(donors) == list(range(len(rows)))
    for taker, donor in enumerate(donors):
        assert rows[taker].patient != rows[donor].patient
        assert (rows[taker].split, rows[taker].label) == (rows[donor].split, rows[donor].label)


@pytest.mark.parametrize("seed", range(5))
def test_a_patient_with_most_of_a_class_still_gets_other_images(seed: int) -> None:
    rows = records({"a": 7, "b": 2})
    donors = derange(rows, seed)
    assert sorted(donors) == list(range(9)) and all(taker != donor for taker, donor in enumerate(donors))
    assert sum(rows[t].patient == rows[d].patient for t, d in enumerate(donors)) == 5  # 7 regions of a, 2 takers elsewhere


def test_a_lone_image_keeps_its_own_and_rows_without_patients_get_another_image() -> None:
    assert derange(records({"a": 1}), 0) == [0]
    rows = [replace(r, patient=None) for r in records({"a": 6})]
    assert all(taker != donor for taker, donor in enumerate(derange(rows, 0)))


def test_order_of_the_rows_changes_nothing_and_the_seed_does() -> None:
    rows = records({"a": 4, "b": 4, "c": 4})
    by_name = {rows[t].name: rows[d].name for t, d in enumerate(derange(rows, 1))}
    turned = rows[::-1]
    assert by_name == {turned[t].name: turned[d].name for t, d in enumerate(derange(turned, 1))}
    assert by_name != {rows[t].name: rows[d].name for t, d in enumerate(derange(rows, 2))}


def test_folder_holds_the_regions_of_others_and_pretraining_reads_it(tmp_path: Path) -> None:
    index = write_set(tmp_path)
    report = shuffle_regions(index, tmp_path / "masks", tmp_path / "shuffled", seed=3)
    assert (report.images, report.other_patient, report.kept) == (30, 24, 0)  # val has one patient per class
    assert report.overlap < 0.9
    listed = [r for r in read_list(index) if r.split != "test"]
    before, after = open_regions(tmp_path / "masks"), open_regions(tmp_path / "shuffled")
    assert not any(after.has(r) for r in read_list(index) if r.split == "test")
    for key in {(r.split, r.label) for r in listed}:
        group = [r for r in listed if (r.split, r.label) == key]
        area = [Counter(int(store.region(r, ReadSettings()).sum()) for r in group) for store in (before, after)]
        assert area[0] == area[1]
    moved = sum(not torch.equal(before.region(r, ReadSettings()), after.region(r, ReadSettings())) for r in listed)
    assert moved == len(listed)
    assert PretrainDataset(listed, ReadSettings(size=32), tmp_path / "shuffled")[0]["region"].shape == (32, 32)
    again = shuffle_regions(index, tmp_path / "masks", tmp_path / "again", seed=3)
    assert (tmp_path / "again" / "regions.json").read_text() == (tmp_path / "shuffled" / "regions.json").read_text() and again.overlap == report.overlap


def test_a_region_takes_the_size_of_its_new_image(tmp_path: Path) -> None:
    index = write_set(tmp_path, patients=2, images=1)
    text = index.read_text().replace("rounder", "round")
    index.write_text(text)
    Image.fromarray(np.full((96, 20), 90, np.uint8)).save(tmp_path / "images" / "p01_0.png")
    mask = np.zeros((96, 20), np.uint8)
    mask[:48] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "p01_0.png")
    shuffle_regions(index, tmp_path / "masks", tmp_path / "out")
    first, second = (open_regions(tmp_path / "out").region(r, ReadSettings()) for r in read_list(index))
    assert first.shape == (48, 40) and torch.equal(first, (torch.arange(48) < 24).float()[:, None].expand(48, 40))
    assert second.shape == (96, 20) and set(second.unique().tolist()) == {0.0, 1.0}


def test_nothing_to_shuffle_ends_in_one_sentence(tmp_path: Path) -> None:
    index = write_set(tmp_path, patients=2)
    with pytest.raises(DataError, match="regions must hold those of the images in val") as caught:
        shuffle_regions(index, tmp_path / "masks", tmp_path / "out", splits=("val",))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="holds other files"):
        shuffle_regions(index, tmp_path / "masks", tmp_path / "images")
