"""Splits keep patients whole; wrong labels and empty classes end in one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from drawn import draw, rows_with_patients, with_splits, write_index

from mwm.data import DataError
from mwm.transfer.config import TransferError
from mwm.transfer.fractions import keep_fraction
from mwm.transfer.labelled import SPLITS, lone_patients, read_labelled


def tree(root: Path, counts: dict[str, int]) -> Path:
    """Folders with drawn images: {"train/along": 4, …}"""
    rng = np.random.default_rng(0)
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            draw(rng, Path(folder).name).save(root / folder / f"{k}.png")
    return root


def test_splits_of_the_index_are_kept(index: Path) -> None:
    data = read_labelled(index)
    assert data.classes == ("across", "along")
    assert {split: len(data.of(split)) for split in SPLITS} == {"train": 36, "val": 12, "test": 12}
    assert data.patients_known
    assert not data.notes


def test_folder_that_holds_an_index_is_read_by_it(index: Path) -> None:
    assert [c.record.name for c in read_labelled(index.parent).cases] == [c.record.name for c in read_labelled(index).cases]


def test_missing_splits_are_made_by_patient_and_repeat_for_a_seed(tmp_path: Path) -> None:
    index = write_index(tmp_path, rows_with_patients(40, 3))
    data = read_labelled(index, seed=3)
    owners = {split: {case.patient for case in data.of(split)} for split in SPLITS}
    assert all(owners.values())
    assert not owners["train"] & owners["val"] | owners["train"] & owners["test"] | owners["val"] & owners["test"]
    assert all({case.label for case in data.of(split)} == {0, 1} for split in SPLITS)
    assert len(owners["test"]) == 10
    again = read_labelled(index, seed=3)
    assert [c.split for c in data.cases] == [c.split for c in again.cases]
    assert [c.split for c in data.cases] != [c.split for c in read_labelled(index, seed=4).cases]


def test_patients_whose_first_image_is_always_of_one_class_are_split(tmp_path: Path) -> None:
    """Slices of a scan from top to bottom: every patient begins with one that shows nothing."""
    rows = [{"file": f"p{p:02d}_{k}.png", "label": ("across", "along")[k > 1], "patient": f"p{p:02d}"} for p in range(8) for k in range(4)]
    data = read_labelled(write_index(tmp_path, rows))
    owners = {split: {case.patient for case in data.of(split)} for split in SPLITS}
    assert {split: len(found) for split, found in owners.items()} == {"train": 5, "val": 1, "test": 2}
    assert sum(map(len, owners.values())) == len(set.union(*owners.values()))


def test_patients_count_to_the_class_that_fewest_have(tmp_path: Path) -> None:
    """Three of forty patients have a finding, beside images without: it must not fall out of a split by chance."""
    rows = [{"file": f"p{p:02d}_{k}.png", "label": "along" if p < 3 and k else "across", "patient": f"p{p:02d}"} for p in range(40) for k in range(2)]
    index = write_index(tmp_path, rows)
    for seed in range(5):
        data = read_labelled(index, seed=seed)
        assert all({case.label for case in data.of(split)} == {0, 1} for split in SPLITS)


def test_masks_need_no_two_patients_of_a_label(tmp_path: Path) -> None:
    rows = [row | {"mask": row["file"]} for row in rows_with_patients(9)]
    rows[0]["label"] = rows[1]["label"] = "oblique"
    data = read_labelled(write_index(tmp_path, rows), need="mask")
    assert {case.split for case in data.cases if case.patient == "p00"} == {"train"}
    assert all(data.of(split) for split in SPLITS)


def test_a_split_of_one_patient_is_noted(tmp_path: Path) -> None:
    rows = [{"file": f"{split}{p}_{k}.png", "label": ("across", "along")[k % 2], "patient": f"{split}{p}", "split": split}
            for split, count in (("train", 2), ("val", 2), ("test", 1)) for p in range(count) for k in range(2)]
    data = read_labelled(write_index(tmp_path, rows))
    assert lone_patients(data) == ["test holds one patient only: its figures say nothing about others."]
    assert lone_patients(replace(data, patients_known=False)) == []


def test_slices_of_a_volume_stay_in_one_split_without_patients(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for k in range(8):
        path = tmp_path / ("across", "along")[k % 2] / f"scan{k}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(rng.normal(0, 9, (8, 8, 6)).astype(np.float32), np.eye(4)), path)
    data = read_labelled(tmp_path)
    files = {split: {case.file for case in data.of(split)} for split in SPLITS}
    assert {split: len(data.of(split)) for split in SPLITS} == {"train": 24, "val": 12, "test": 12}
    assert {split: len(found) for split, found in files.items()} == {"train": 4, "val": 2, "test": 2}
    assert not data.patients_known and any("slices of a file stay together" in note for note in data.notes)
    kept = keep_fraction(data.of("train"), 0.5, seed=0)
    assert len({case.file for case in kept}) == 2 and len(kept) == 12


def test_missing_val_split_is_taken_from_training_patients_only(tmp_path: Path) -> None:
    rows = [row | {"split": "test" if int(row["patient"][1:]) < 6 else "train"} for row in rows_with_patients()]
    data = read_labelled(write_index(tmp_path, rows))
    assert {case.patient for case in data.of("test")} == {f"p{k:02d}" for k in range(6)}
    assert data.of("val")
    assert not {c.patient for c in data.of("val")} & {c.patient for c in data.of("train")}
    assert "no val split" in data.notes[0]


def test_folder_per_class_is_read_and_says_that_patients_are_unknown(tmp_path: Path) -> None:
    data = read_labelled(tree(tmp_path, {"along": 8, "across": 8}))
    assert data.classes == ("across", "along")
    assert not data.patients_known
    assert any("Patients are not known" in note for note in data.notes)


def test_folders_of_splits_hold_folders_of_classes(tmp_path: Path) -> None:
    data = read_labelled(tree(tmp_path, {f"{split}/{label}": n for split, n in (("train", 5), ("valid", 2), ("test", 3)) for label in ("along", "across")}))
    assert {split: len(data.of(split)) for split in SPLITS} == {"train": 10, "val": 4, "test": 6}


def test_labels_choose_among_classes_and_other_splits_are_left_out(tmp_path: Path) -> None:
    rows = with_splits(rows_with_patients())
    rows += [row | {"file": "x" + row["file"], "label": "third"} for row in rows] + [rows[0] | {"file": "odd.png", "split": "unlabelled"}]
    index = write_index(tmp_path, rows)
    data = read_labelled(index, labels=("along", "across"))
    assert data.classes == ("across", "along")
    assert any("'unlabelled'" in note for note in data.notes)
    with pytest.raises(TransferError, match="labels must occur in DATA, got fourth"):
        read_labelled(index, labels=("along", "fourth"))


def test_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    rows = with_splits(rows_with_patients())
    rows[0]["split"] = "test" if rows[0]["split"] != "test" else "train"
    with pytest.raises(TransferError, match="a patient must be in one split only, got 1 patients"):
        read_labelled(write_index(tmp_path, rows))


def test_label_that_only_the_test_has_is_refused_with_the_near_word(tmp_path: Path) -> None:
    rows = with_splits(rows_with_patients())
    next(row for row in rows if row["split"] == "test" and row["label"] == "along")["label"] = "allong"
    with pytest.raises(TransferError, match=r"got 'allong', which does not \(is it 'along'\?\)"):
        read_labelled(write_index(tmp_path, rows))


@pytest.mark.parametrize("split", ["val", "test"])
def test_class_that_a_split_lacks_is_refused(tmp_path: Path, split: str) -> None:
    rows = [row for row in with_splits(rows_with_patients()) if not (row["split"] == split and row["label"] == "along")]
    with pytest.raises(TransferError, match=f"every class must have images in {split}, got none of along"):
        read_labelled(write_index(tmp_path, rows))


def test_one_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="at least two classes, got only 'along'"):
        read_labelled(tree(tmp_path, {"along": 4}))


def test_empty_class_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="every class folder must hold images, got none in across"):
        read_labelled(tree(tmp_path, {"along": 4, "across": 0}))


def test_images_beside_the_class_folders_are_refused(tmp_path: Path) -> None:
    tree(tmp_path, {"along": 3, "across": 3})
    draw(np.random.default_rng(0), "along").save(tmp_path / "loose.png")
    with pytest.raises(TransferError, match=r"loose\.png"):
        read_labelled(tmp_path)


def test_index_without_labels_is_refused(tmp_path: Path) -> None:
    rows = [row | {"label": ""} for row in rows_with_patients(4)]
    with pytest.raises(TransferError, match="column `label`"):
        read_labelled(write_index(tmp_path, rows))


def test_class_with_one_patient_cannot_be_divided(tmp_path: Path) -> None:
    rows = [row for row in rows_with_patients(12) if row["label"] == "across" or row["patient"] == "p00"]
    with pytest.raises(TransferError, match="class 'along' must have at least two patients"):
        read_labelled(write_index(tmp_path, rows))


def test_class_that_only_the_test_split_holds_is_refused_as_such(tmp_path: Path) -> None:
    rows = [row for row in with_splits(rows_with_patients()) if row["split"] != "val"]
    typo = next(row for row in rows if row["split"] == "test")
    rows = [row | {"label": "alogn"} if row is typo else row for row in rows]
    with pytest.raises(TransferError, match="class 'alogn' must have training images, got none"):
        read_labelled(write_index(tmp_path, rows))


def test_typing_error_in_training_labels_is_named_with_the_near_word(tmp_path: Path) -> None:
    rows = with_splits(rows_with_patients())
    next(row for row in rows if row["split"] == "train" and row["label"] == "along")["label"] = "allong"
    with pytest.raises(TransferError, match=r"every class must have images in test, got none of allong \(is it 'along'\?\)"):
        read_labelled(write_index(tmp_path, rows))
    for row in rows:
        del row["split"]
    with pytest.raises(TransferError, match=r"class 'allong' must have at least two patients .* got 1 \(is it 'along'\?\)"):
        read_labelled(write_index(tmp_path / "unsplit", rows))


def test_typing_error_in_chosen_labels_is_named_with_the_near_word(index: Path) -> None:
    with pytest.raises(TransferError, match=r"labels must occur in DATA, got acros \(is it 'across'\?\)"):
        read_labelled(index, labels=("acros", "along"))


def test_label_in_two_spellings_is_refused(tmp_path: Path) -> None:
    rows = rows_with_patients()
    rows[0]["label"] = "Along"
    with pytest.raises(TransferError, match="a label must be written in one way, got 'Along' and 'along'"):
        read_labelled(write_index(tmp_path, rows))


def test_patient_in_two_splits_is_noted_where_it_is_allowed(tmp_path: Path) -> None:
    rows = with_splits(rows_with_patients())
    rows[0]["split"] = "test" if rows[0]["split"] != "test" else "train"
    assert any("LEAK allowed: 1 patients" in note for note in read_labelled(write_index(tmp_path, rows), allow_leak=True).notes)


def test_masks_and_boxes_come_with_the_case_and_need_no_class(tmp_path: Path) -> None:
    rows = [row | {"mask": "masks/a.png", "boxes": '[{"label": "spot", "bbox_xyxy": [1, 2, 3, 4]}]', "label": ""} for row in with_splits(rows_with_patients())]
    rows[0] |= {"mask": "", "boxes": ""}
    index = write_index(tmp_path, rows)
    data = read_labelled(index, need="mask")
    assert (data.classes, {case.label for case in data.cases}) == ((), {-1})
    assert (data.cases[0].mask, data.cases[0].boxes) == (None, None)
    assert data.cases[1].mask == (tmp_path / "masks" / "a.png").resolve()
    assert read_labelled(index, need="boxes").cases[1].boxes == [{"label": "spot", "bbox_xyxy": [1, 2, 3, 4]}]
    with pytest.raises(TransferError, match="column `label`"):
        read_labelled(index)


@pytest.mark.parametrize("path", ["../outside.png", "/etc/passwd", "masks/../../up.png"])
def test_mask_outside_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    index = write_index(tmp_path, [row | {"mask": path} for row in with_splits(rows_with_patients())])
    with pytest.raises(DataError, match=r"paths must (be relative|stay inside)"):
        read_labelled(index, need="mask")


@pytest.mark.parametrize(("need", "words"), [("mask", "column `mask` with paths of masks"), ("boxes", "column `boxes` with JSON lists of boxes")])
def test_index_without_masks_or_boxes_is_refused(index: Path, need: str, words: str) -> None:
    with pytest.raises(TransferError, match=words):
        read_labelled(index, need=need)
