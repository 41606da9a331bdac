"""Where COCO files and their images are found, and what DATA of a detection run may be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from drawn_objects import as_coco, rewrite, write_objects

from mwm.data import ReadSettings
from mwm.train.export import Preprocessing
from mwm.transfer.config import FinetuneConfig, TransferError
from mwm.transfer.detect_data import check_objects, coco_files, detection_records, read_detection
from mwm.transfer.detect_images import read_scenes
from mwm.transfer.start import open_start

pytest.importorskip("pycocotools")


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(("names", "found"), [
    (("train.json", "val.json", "test.json"), [("train", "train.json"), ("val", "val.json"), ("test", "test.json")]),
    (("annotations/instances_train2017.json", "annotations/instances_val2017.json"),
     [("train", "annotations/instances_train2017.json"), ("val", "annotations/instances_val2017.json")]),
    (("train/_annotations.coco.json", "valid/_annotations.coco.json", "test/_annotations.coco.json"),
     [("train", "train/_annotations.coco.json"), ("val", "valid/_annotations.coco.json"), ("test", "test/_annotations.coco.json")]),
    (("annotations.json",), [("", "annotations.json")]), (("annotations/instances.json",), [("", "annotations/instances.json")]),
    (("settings.json",), []), (("index.csv", "train.json"), []),
])
def test_files_of_usual_layouts_are_found(names: tuple[str, ...], found: list, tmp_path: Path) -> None:
    assert coco_files(touch(tmp_path, *names)) == [(split, tmp_path / name) for split, name in found]


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="one COCO file per split"):
        coco_files(touch(tmp_path, "val.json", "valid.json"))


def settings(data: Path, **changes) -> FinetuneConfig:
    return FinetuneConfig(**({"run": "r", "data": data, "task": "detect"} | changes))


def split_files(tmp_path: Path, *, images: str = "images") -> Path:
    """One COCO file per split beside a folder of images."""
    index = write_objects(tmp_path / "source", patients=10)
    whole = as_coco(index)
    folder = tmp_path / "coco"
    folder.mkdir()
    (index.parent / "images").rename(folder / images)
    for split in ("train", "val", "test"):
        ids = {row["id"] for row in whole["images"] if row["split"] == split}
        part = whole | {"images": [{k: v for k, v in row.items() if k != "split"} for row in whole["images"] if row["id"] in ids],
                        "annotations": [row for row in whole["annotations"] if row["image_id"] in ids]}
        (folder / f"{split}.json").write_text(json.dumps(part))
    return folder


def test_one_file_per_split_gives_the_splits_and_finds_the_images(tmp_path: Path) -> None:
    data, describe = read_detection(settings(split_files(tmp_path)), ReadSettings())
    assert {split: len(data.of(split)) for split in ("train", "val", "test")} == {"train": 12, "val": 4, "test": 4}
    assert data.patients_known
    assert all(case.record.path.is_file() for case in data.cases)
    assert all(case.record.name.startswith("images/") for case in data.cases)
    assert set(describe(data.cases[0], (64, 64)).names) <= {"disc", "square"}


def test_without_a_run_the_channels_are_those_of_the_images_of_a_coco_file(tmp_path: Path) -> None:
    folder = split_files(tmp_path)
    for data in (folder / "train.json", folder):
        start = settings(data, run=None, encoder="resnet10t", init="scratch", image_size=32, out=tmp_path / "out")
        assert open_start(start, lambda reading, start=start: detection_records(start, reading)).preprocessing.channels == 1


def test_one_image_in_two_split_files_is_refused(tmp_path: Path) -> None:
    folder = split_files(tmp_path)
    (folder / "test.json").write_text((folder / "train.json").read_text())
    with pytest.raises(TransferError, match=r"in train and test"):
        read_detection(settings(folder), ReadSettings())


def test_labels_keep_their_objects_and_images_of_others_are_left_out(tmp_path: Path) -> None:
    folder = split_files(tmp_path)
    data, describe = read_detection(settings(folder, labels="disc"), ReadSettings())
    assert any("other classes only" in note for note in data.notes)
    assert {name for case in data.cases for name in describe(case, (64, 64)).names} == {"disc"}
    with pytest.raises(TransferError, match="labels must occur"):
        read_detection(settings(folder, labels="disk"), ReadSettings())


def test_data_that_is_nothing_of_the_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=r"index CSV, a COCO JSON"):
        read_detection(settings(tmp_path), ReadSettings())


def test_splits_of_one_file_without_any_are_made_by_patient(tmp_path: Path) -> None:
    index = write_objects(tmp_path / "source", patients=12, split=False)
    (tmp_path / "all.json").write_text(json.dumps(as_coco(index)))
    data, _ = read_detection(settings(tmp_path / "all.json", images=index.parent / "images"), ReadSettings())
    homes = {}
    for case in data.cases:
        homes.setdefault(case.patient, set()).add(case.split)
    assert all(len(found) == 1 for found in homes.values())
    assert {split for found in homes.values() for split in found} == {"train", "val", "test"}


def test_few_images_without_masks_are_left_out_and_many_make_boxes_alone(tmp_path: Path) -> None:
    index = write_objects(tmp_path / "data", patients=10)
    for gone, kept, masks in (("p03", 18, True), ("p0", 20, False)):
        rewrite(index, lambda row, gone=gone: row | {"mask": ""} if row["file"].startswith(f"images/{gone}") else row)
        data, describe = read_detection(settings(index), ReadSettings())
        scenes, _ = read_scenes(data.cases, describe, Preprocessing((64, 64), 1, (0.4,), (0.2,), ReadSettings().to_dict()))
        checked, learnt = check_objects(data, scenes, masks=True)
        assert (len(checked.cases), learnt) == (kept, masks)
        assert any("without a mask" in note for note in checked.notes)
    checked, learnt = check_objects(data, scenes, masks=False)
    assert (len(checked.cases), learnt) == (20, False)
