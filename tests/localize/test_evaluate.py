"""Regions against masks: figures by hand and by brute force, patches as masking counts them, missing things told."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mwm.cli import main
from mwm.data import RegionMaps, read_list
from mwm.localize.evaluate import FIGURES, GridSettings, evaluate_regions, image_row, summarise
from mwm.masking import inside_grid

GRID = GridSettings(image_size=64, patch_size=16)


def box(top: int, left: int, bottom: int, right: int, size: int = 64) -> torch.Tensor:
    region = torch.zeros(size, size)
    region[top:bottom, left:right] = 1
    return region


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six images of three patients; the mask of the last is empty. Index CSV with relative paths."""
    rows = []
    for k in range(6):
        pixels = np.random.default_rng(k).integers(0, 255, (64, 64), dtype=np.uint8)
        for name, values in ((f"images/{k}.png", pixels), (f"masks/{k}.png", box(8, 8, 40, 24).numpy().astype(np.uint8) * (255 if k < 5 else 0))):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            Image.fromarray(values).save(tmp_path / name)
        rows.append({"file": f"images/{k}.png", "mask": f"masks/{k}.png", "patient": f"p{k // 2}", "split": "test"})
    with (tmp_path / "index.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


def test_figures_of_one_image_are_those_counted_by_hand() -> None:
    row = image_row(box(0, 0, 32, 32), box(0, 0, 32, 16), GRID)
    assert row["dice"] == pytest.approx(2 * 512 / (1024 + 512)) and row["iou"] == pytest.approx(0.5)
    assert row["pointing"] == 1 and row["area"] == pytest.approx(512 / 4096) and row["roi_area"] == pytest.approx(1024 / 4096)
    assert row["roi_inside"] == 0.5 and row["region_patches"] == 2 / 16 and row["excess"] == pytest.approx(0.375)


@pytest.mark.parametrize("region", [torch.ones(64, 64), torch.zeros(64, 64)])
def test_everything_and_nothing_have_no_excess(region: torch.Tensor) -> None:
    row = image_row(box(4, 4, 30, 30), region, GRID)
    assert row["excess"] == 0 and row["roi_inside"] == row["region_patches"] == float(region[0, 0])
    assert row["pointing"] == pytest.approx(float(region[0, 0]) * 26 * 26 / 4096)


def test_region_at_a_random_place_has_no_excess_on_average() -> None:
    draw = np.random.default_rng(0)
    excess = []
    for _ in range(400):
        top, left, up, west = draw.integers(0, 3, 4) * 16
        excess.append(image_row(box(top, left, top + 16, left + 16, 48), box(up, west, up + 16, west + 16, 48), GridSettings(48, 16))["excess"])
    assert abs(np.mean(excess)) < 0.05


def test_patches_are_those_that_masking_calls_region() -> None:
    generator = torch.Generator().manual_seed(0)
    truth, region = (torch.rand(2, 64, 64, generator=generator) > 0.7).float()
    region[:, 32:] = 0
    row = image_row(truth, region * 0.6, GRID)
    inside = inside_grid(torch.stack([truth, region * 0.6]), (4, 4))[0]
    assert row["region_patches"] == float(inside[1].float().mean()) and row["roi_inside"] == float(inside[1][inside[0]].float().mean())


def test_soft_regions_are_cut_at_a_half_and_point_with_their_values() -> None:
    truth, region = box(0, 0, 16, 16), 0.4 * box(0, 0, 16, 16)
    region[40, 40] = 0.45
    row = image_row(truth, region, GRID)
    assert row["dice"] == 0 and row["pointing"] == 0 and row["area"] > 0
    region[8, 8] = 0.46
    assert image_row(truth, region, GRID)["pointing"] == 1


def test_means_are_over_masks_that_are_not_empty_and_intervals_over_patients(data: Path) -> None:
    records = list(read_list(data / "index.csv"))
    maps = {record.id: box(8, 8, 40, 24) if k % 2 == 0 else box(0, 0, 0, 0) for k, record in enumerate(records)}
    del maps[records[4].id]
    found = evaluate_regions(RegionMaps(maps), records, grid=GRID, progress=False)
    s = found.summary
    assert (s["images"], s["negatives"], s["lost"], s["patients"], s["marked_negatives"]) == (4, 1, 1, 2, 0)
    assert s["dice"]["value"] == 0.5 and s["empty"] == 0.5 and s["dice"]["low"] == s["dice"]["high"] == 0.5  # each patient has one of both
    assert found.examples(1) == {"best": [0], "median": [1], "worst": [3]}
    assert "1 without a region left out" in str(found) and "4x4 grid" in str(found)


def test_summary_of_nothing_and_of_unknown_patients_is_defined() -> None:
    row = image_row(box(0, 0, 16, 16), box(0, 0, 16, 16), GRID)
    assert summarise([row, row], [None, "a"])["patients"] is None
    empty = image_row(box(0, 0, 0, 0), box(0, 0, 16, 16), GRID)
    s = summarise([empty], ["a"])
    assert s["images"] == 0 and s["dice"]["value"] is None and s["marked_negatives"] == 1 and math.isnan(empty["roi_inside"])


def test_command_writes_figures_and_a_gallery_without_names(data: Path, capsys: pytest.CaptureFixture) -> None:
    out = data / "out"
    assert main(["localize", "eval", str(data / "masks"), str(data / "index.csv"), "--image-size", "64", "--patch-size", "16", "--out", str(out)]) == 0
    assert "Dice" in capsys.readouterr().out
    told = json.loads((out / "metrics.json").read_text())
    assert told["regions"]["dice"]["value"] == 1 and "images/" not in (out / "metrics.json").read_text()
    with (out / "images.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["file", *FIGURES] and len(rows) == 6
    with Image.open(out / "gallery.png") as picture:
        assert picture.width > 600
    assert main(["localize", "eval", str(data / "masks"), str(data / "masks"), "--images", str(data / "images"), "--out", str(out)]) == 0


@pytest.mark.parametrize(("words", "sentence"), [
    (["masks", "masks"], "--images must be given"),
    (["masks", "images"], "--images must be given"),
    (["none", "index.csv"], "must be a folder of regions or masks"),
    (["masks", "index.csv", "--patch-size", "30"], "patch_size must divide"),
    (["masks", "index.csv", "--min-cover", "0"], "min_cover must be in"),
])
def test_bad_input_is_one_sentence(data: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture) -> None:
    asked = ["localize", "eval", *(str(data / word) if not word.startswith("-") and not word.isdigit() else word for word in words), "--out", str(data / "out")]
    assert main(asked) == 2
    assert sentence in capsys.readouterr().err
