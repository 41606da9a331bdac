"""Masks that the user has, as regions."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mwm
from mwm.data import open_regions, read_list
from mwm.localize import RefineSettings, localize_folder


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def box(height: int, width: int, top: int, left: int, edge: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[top : top + edge, left : left + edge] = 255
    return mask


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for index in range(4):
        save(tmp_path / "images" / "ward" / f"{index}.png", np.random.default_rng(index).integers(0, 255, (40, 60), dtype=np.uint8))
    return tmp_path / "images"


def regions_of(images: Path, masks: Path | None, out: Path, **options: object) -> tuple[object, list[torch.Tensor]]:
    report = localize_folder(images, None, mwm.create_localizer("maps", checkpoint=masks), out, progress=False, **options)
    cache = open_regions(out)
    return report, [cache.region(record) for record in read_list(images)] if not report.skipped else []


@pytest.mark.parametrize("pattern", ["ward/{}.png", "ward/{}.tif", "{}.png", "ward/{}_mask.png"])
def test_masks_are_found_by_relative_name_or_stem(scans: Path, tmp_path: Path, pattern: str) -> None:
    for index in range(4):
        save(tmp_path / "masks" / pattern.format(index), box(40, 60, index, 2 * index, 9))
    report, regions = regions_of(scans, tmp_path / "masks", tmp_path / "regions")
    assert report.images == 4
    for index, region in enumerate(regions):
        assert np.array_equal(region.numpy() * 255, box(40, 60, index, 2 * index, 9))


def test_mask_column_of_the_index_needs_no_folder(scans: Path, tmp_path: Path) -> None:
    with (tmp_path / "index.csv").open("w", newline="") as file:
        rows = [(f"images/ward/{i}.png", f"drawn/{3 - i}.png") for i in range(4)]
        csv.writer(file).writerows([("file", "mask"), *rows])
    for index in range(4):
        save(tmp_path / "drawn" / f"{index}.png", box(40, 60, index, 0, 7))
    _, regions = regions_of(tmp_path / "index.csv", None, tmp_path / "regions")
    assert [int(region.sum(1).argmax()) for region in regions] == [3, 2, 1, 0]


def test_protocol_takes_file_names_for_texts(tmp_path: Path) -> None:
    mask = save(tmp_path / "m.png", box(40, 60, 4, 5, 11))
    region = mwm.create_localizer("maps", checkpoint=tmp_path)(torch.rand(1, 1, 40, 60), [str(mask)])
    assert region.shape == (1, 40, 60) and region.sum() == 121


def test_mask_of_another_size_is_resized_only_if_the_aspect_ratio_agrees(scans: Path, tmp_path: Path) -> None:
    for index in range(3):
        save(tmp_path / "masks" / "ward" / f"{index}.png", box(80, 120, 20, 40, 30))
    save(tmp_path / "masks" / "ward" / "3.png", box(80, 80, 20, 40, 30))
    report, _ = regions_of(scans, tmp_path / "masks", tmp_path / "regions")
    assert report.images == 3 and report.skipped == 1
    assert "80 x 80 for an image of 40 x 60" in (tmp_path / "regions" / "skipped.csv").read_text()
    region = open_regions(tmp_path / "regions").region(read_list(scans)[0])
    assert np.array_equal(region.numpy() > 0.5, box(40, 60, 10, 20, 15) > 0)


def test_image_without_a_mask_is_skipped_and_listed(scans: Path, tmp_path: Path) -> None:
    for index in range(3):
        save(tmp_path / "masks" / "ward" / f"{index}.png", box(40, 60, 4, 4, 9))
    report, _ = regions_of(scans, tmp_path / "masks", tmp_path / "regions")
    assert report.images == 3 and report.skipped == 1
    with pytest.raises(ValueError, match=r"no mask for ward/3\.png"):
        regions_of(scans, tmp_path / "masks", tmp_path / "strict", strict=True)


def test_changed_mask_changes_the_cached_region(scans: Path, tmp_path: Path) -> None:
    for index in range(4):
        save(tmp_path / "masks" / "ward" / f"{index}.png", box(40, 60, 4, 4, 9))
    regions_of(scans, tmp_path / "masks", tmp_path / "regions")
    save(tmp_path / "masks" / "ward" / "2.png", box(40, 60, 20, 20, 5))
    report, regions = regions_of(scans, tmp_path / "masks", tmp_path / "regions")
    assert report.made == 1 and regions[2].sum() == 25


def test_masks_are_taken_as_they_are_unless_refinement_is_asked_for(scans: Path, tmp_path: Path) -> None:
    for index in range(4):
        save(tmp_path / "masks" / "ward" / f"{index}.png", np.maximum(box(40, 60, 4, 4, 9), box(40, 60, 30, 50, 3)))
    full = np.full((40, 60), 255, dtype=np.uint8)
    save(tmp_path / "masks" / "ward" / "3.png", full)
    report, regions = regions_of(scans, tmp_path / "masks", tmp_path / "a")
    assert [int(region.sum()) for region in regions] == [90, 90, 90, 2400] and report.full == 1
    _, regions = regions_of(scans, tmp_path / "masks", tmp_path / "b", refinement=RefineSettings(components=1))
    assert [int(region.sum()) for region in regions] == [81, 81, 81, 0]


def test_slices_of_a_volume_take_the_slices_of_its_mask(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    scan = np.random.default_rng(0).normal(100, 20, (20, 24, 3)).astype(np.float32)
    mask = np.zeros((20, 24, 3), dtype=np.uint8)
    for index in range(3):
        mask[: 4 + index, :5, index] = 1
    (tmp_path / "volumes").mkdir()
    (tmp_path / "masks").mkdir()
    nibabel.save(nibabel.Nifti1Image(scan, np.eye(4)), tmp_path / "volumes" / "head.nii.gz")
    nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), tmp_path / "masks" / "head.nii.gz")
    report, regions = regions_of(tmp_path / "volumes", tmp_path / "masks", tmp_path / "regions")
    assert report.images == 3
    assert [int(region.sum()) for region in regions] == [20, 25, 30]


def test_folder_that_is_not_there_or_has_no_masks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not there"):
        mwm.create_localizer("maps", checkpoint=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="got none"):
        mwm.create_localizer("maps", checkpoint=tmp_path)
