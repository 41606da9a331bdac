"""A localizer that learnt from masks says so, and so do its regions, their report and their evaluation: nobody takes them for text-guided by accident."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.localize.clip_folders import make

import mwm
from mwm.cli import main
from mwm.data import RegionCache, open_regions, read_list
from mwm.localize import localize_folder
from mwm.localize.ensemble import EnsembleLocalizer
from mwm.localize.evaluate import evaluate_regions
from mwm.localize.training import KEY, SUPERVISED, Training, source_line, training_from, training_of


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    rows = [("file", "mask", "caption", "patient")]
    for index in range(6):
        pixels, mask = np.random.default_rng(index).integers(0, 60, (48, 48)).astype(np.uint8), np.zeros((48, 48), np.uint8)
        mask[8:24, 8 + index : 30] = 255
        Image.fromarray(np.where(mask > 0, 230, pixels).astype(np.uint8)).save(root / f"{index}.png")
        Image.fromarray(mask).save(root / f"{index}_mask.png")
        rows.append((f"{index}.png", f"{index}_mask.png", f"{('left', 'right')[index % 2]} lung", f"p{index}"))
    with (root / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


def trained(scans: Path, start: Path, out: Path, *more: str) -> Path:
    """By the command line, as a user would."""
    words = ["localize", "train", str(scans / "index.csv"), "--checkpoint", str(start), "--out", str(out), "--epochs", "1", "--batch-size", "3", "--val-share", "0.4",
             "--workers", "0", "--device", "cpu", *more]
    assert main(words) == 0
    return out


@pytest.fixture(scope="module")
def head(scans: Path, clipseg_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(scans, clipseg_folder, tmp_path_factory.mktemp("head") / "head", "--prompt", "a square", "--absent", "cat")


@pytest.fixture(scope="module")
def towers(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("towers")
    return trained(scans, make("clip", root / "clip"), root / "towers")


def test_a_folder_that_was_trained_says_on_what_and_how_many_and_names_no_file(head: Path, towers: Path, clipseg_folder: Path) -> None:
    masks, captions = training_of(head), training_of(towers)
    assert (masks.on, masks.images, masks.supervised) == ("masks", 6, True) and (captions.on, captions.images, captions.supervised) == ("captions", 6, False)
    assert len(masks.list) == 32 and masks.list != captions.list and masks.before is None
    assert training_of(clipseg_folder) is None and training_of("biomedclip") is None and training_of(head / "nowhere") is None
    for folder in (head, towers):
        told = json.loads((folder / "training.json").read_text())
        assert told["trained_on"] == training_of(folder).to_dict() and ".png" not in (folder / "config.json").read_text() + (folder / "training.json").read_text()


def test_every_localizer_that_reads_such_a_folder_knows(head: Path, towers: Path, clipseg_folder: Path) -> None:
    localizer = mwm.create_localizer("clipseg", checkpoint=head, device="cpu")
    assert localizer.training == training_of(head) == EnsembleLocalizer(localizer, ["a square"]).training
    assert mwm.create_localizer("clipseg", checkpoint=clipseg_folder, device="cpu").training is None
    for name in ("bottleneck", "gradcam", "gscorecam"):
        assert mwm.create_localizer(name, checkpoint=towers, device="cpu").training == training_of(towers)
    assert mwm.create_localizer("tiny", device="cpu").training.supervised


def test_masks_of_an_earlier_training_are_not_forgotten(head: Path, scans: Path, tmp_path: Path) -> None:
    again = training_of(trained(scans, head, tmp_path / "again", "--prompt", "box", "--absent", "cat"))
    assert again.before == training_of(head) and again.supervised
    assert Training("captions", 3, "x", Training("masks", 2, "y")).source()["kind"] == SUPERVISED
    assert training_from(again.to_dict()) == again


def test_regions_report_and_evaluation_repeat_it(head: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    asked = ["localize", str(scans / "index.csv"), "--prompt", "a square", "--localizer", "clipseg", "--checkpoint", str(head), "--method", "kmeans", "--min-peak", "0",
             "--device", "cpu", "--force", "--out", str(tmp_path / "regions")]
    assert main(asked) == 0
    said = "source: supervised region source; the localizer learnt from masks of 6 images; these regions are not found by text alone"
    assert said in capsys.readouterr().out
    source = open_regions(tmp_path / "regions").meta["source"]
    assert source == {"kind": "supervised region source", "trained_on": "masks", "images": 6, "list": training_of(head).list}
    assert json.loads((tmp_path / "regions" / "report.json").read_text())["source"] == source
    assert main(["localize", "eval", str(tmp_path / "regions"), str(scans / "index.csv"), "--out", str(tmp_path / "eval")]) == 0
    assert said in capsys.readouterr().out and json.loads((tmp_path / "eval" / "metrics.json").read_text())["source"] == source


def test_regions_by_text_say_nothing_of_it_and_take_no_source_over(scans: Path, clipseg_folder: Path, head: Path, tmp_path: Path) -> None:
    for checkpoint, expected in ((head, SUPERVISED), (clipseg_folder, None)):
        localizer = mwm.create_localizer("clipseg", checkpoint=checkpoint, device="cpu")
        report = localize_folder(scans / "index.csv", "a square", localizer, tmp_path / "regions", mwm.localize.RefineSettings(method="kmeans", min_peak=0), progress=False)
        meta = open_regions(tmp_path / "regions").meta
        assert meta.get("source", {}).get("kind") == expected and ("source:" in str(report)) == (expected is not None)
    assert "source" not in json.loads((tmp_path / "regions" / "report.json").read_text())


def test_captions_are_told_but_are_no_masks(towers: Path) -> None:
    line = source_line(training_of(towers).source())
    assert line == "source: localizer trained on captions; the localizer learnt from captions of 6 images"


@pytest.mark.parametrize("wrong", [[], "masks", {}, {"on": "masks"}, {"on": "else", "images": 1, "list": "x"}, {"on": "masks", "images": "1", "list": "x"},
                                   {"on": "captions", "images": 1, "list": "x", "before": {"on": "masks"}}])
def test_a_mark_that_was_tampered_with_is_not_taken_for_none(wrong: object, head: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(head, tmp_path / "head")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {KEY: wrong}))
    for read in (lambda: training_of(folder), lambda: mwm.create_localizer("clipseg", checkpoint=folder, device="cpu")):
        with pytest.raises(ValueError, match=r"mwm_training in config\.json must be what mwm localize train wrote") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_mark_without_end_is_refused_not_followed() -> None:
    endless: dict = {"on": "captions", "images": 1, "list": "x"}
    for _ in range(5000):
        endless = {"on": "captions", "images": 1, "list": "x", "before": endless}
    with pytest.raises(ValueError, match="must be what mwm localize train wrote"):
        training_from(endless)


def test_facts_of_other_tools_and_nonsense_in_a_folder_are_told_or_left_out(scans: Path, tmp_path: Path) -> None:
    assert source_line({"kind": SUPERVISED, "cross-fitted": True, "images": 40}) == "source: supervised region source; these regions are not found by text alone"
    assert [source_line(wrong) for wrong in (None, [], "x", {}, {"kind": 3}, {"kind": "a\nb"}, {"kind": "x" * 400})] == [""] * 7
    cache = RegionCache(tmp_path / "regions")
    key = cache.key("x")
    cache.put(key, torch.ones(48, 48))
    records = list(read_list(scans / "index.csv"))
    for record in records:
        cache.assign(record.id, key)
    cache.meta["source"] = ["a list"]
    cache.save()
    assert "source:" not in str(evaluate_regions(tmp_path / "regions", records, progress=False))
