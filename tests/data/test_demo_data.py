"""The shipped scans: licences, size, splits by patient."""

from __future__ import annotations

import csv
from collections import defaultdict

import pytest
from PIL import Image

from mwm.data import demo_folder, read_image, read_list, read_record_mask
from mwm.data.settings import ReadSettings


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with open(demo_folder() / "index.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_shipped_scans_fit_the_budget_and_carry_their_attribution(rows) -> None:
    assert sum(path.stat().st_size for path in demo_folder().rglob("*") if path.is_file()) <= 4_000_000
    text = (demo_folder() / "ATTRIBUTION.md").read_text()
    for kind in {row["file"].split("/")[0] for row in rows}:
        assert f"`{kind}`" in text
    assert "CC BY 4.0" in text


def test_every_licence_is_plain_cc_by(rows) -> None:
    assert all(row["licence"].startswith("CC BY ") and "SA" not in row["licence"] and "NC" not in row["licence"] for row in rows)


def test_no_shipped_scan_is_of_a_train_split_and_no_patient_is_in_two(rows) -> None:
    assert {row["split"] for row in rows} == {"val", "test"}
    where = defaultdict(set)
    for row in rows:
        where[row["patient"]].add(row["split"])
    assert all(len(splits) == 1 for splits in where.values())


def test_both_classes_of_the_probe_have_patients_in_both_splits(rows) -> None:
    for split in ("val", "test"):
        for label in ("bacterial_pneumonia", "viral_pneumonia"):
            assert len({row["patient"] for row in rows if (row["split"], row["label"]) == (split, label)}) >= 15


def test_every_shipped_file_is_listed_readable_and_without_metadata(rows) -> None:
    records = read_list(demo_folder())
    assert len(records) == len(rows)
    listed = {record.path for record in records} | {record.mask for record in records if record.mask}
    assert {path for path in demo_folder().rglob("*") if path.suffix in (".jpg", ".png")} == listed
    for record in records:
        image = read_image(record)
        assert image.shape[0] == 1 and max(image.shape) <= 256 and image.std() > 0.02
        with Image.open(record.path) as opened:
            assert not opened.getexif() and not {"comment", "exif", "icc_profile"} & set(opened.info)
        if record.mask:
            mask = read_record_mask(record.mask, record, ReadSettings())
            assert mask.shape == image.shape[1:] and 0 < mask.mean() < 0.8
