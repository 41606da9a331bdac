"""What `mwm localize` does with plain values, end to end on a small CLIPSeg checkpoint and on masks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mwm.cli import main
from mwm.data import demo_folder, open_regions, read_list
from mwm.localize import list_localizers, run_localize
from mwm.localize.presets import PRESETS


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    (tmp_path / "scans").mkdir()
    for index in range(3):
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (48, 64), dtype=np.uint8)).save(tmp_path / "scans" / f"{index}.png")
    return tmp_path / "scans"


def test_text_to_regions_on_disk_with_a_local_checkpoint(scans: Path, tmp_path: Path, clipseg_folder: Path, capsys: pytest.CaptureFixture) -> None:
    options = {"localizer": "clipseg", "checkpoint": clipseg_folder, "method": "kmeans", "components": 1, "expand": 1.25, "device": "cpu", "progress": False, "force": True}
    report = run_localize(scans, "both lungs", tmp_path / "regions", **options)
    assert report.images == report.made == 3 and "3 images, 3 computed" in capsys.readouterr().out
    assert run_localize(scans, "both lungs", tmp_path / "regions", **options).made == 0
    cache = open_regions(tmp_path / "regions")
    assert cache.meta["refine"]["expand"] == 1.25 and cache.meta["prompt"] == "both lungs"
    for record in read_list(scans):
        region = cache.region(record)
        assert region.shape == (48, 64) and set(region.unique().tolist()) <= {0.0, 1.0}


def test_masks_need_no_prompt(scans: Path, tmp_path: Path) -> None:
    report = run_localize(scans, out=tmp_path / "regions", localizer="maps", checkpoint=scans, progress=False)
    assert report.images == 3


def test_list_names_every_localizer_and_every_preset(capsys: pytest.CaptureFixture) -> None:
    assert run_localize(list=True) is None
    lines = capsys.readouterr().out.splitlines()
    gap = lines.index("")
    assert [line.split()[0] for line in lines[:gap]] == list_localizers()
    assert [line.split()[0] for line in lines[gap + 2 :]] == list(PRESETS)
    assert all("untested here" in line for line in lines[gap + 2 :])


def test_missing_images_or_prompt_end_in_one_sentence(scans: Path, tmp_path: Path, clipseg_folder: Path) -> None:
    with pytest.raises(ValueError, match="images must be a folder"):
        run_localize()
    with pytest.raises(ValueError, match="Add --prompt TEXT"):
        run_localize(scans, out=tmp_path / "regions", localizer="clipseg", checkpoint=clipseg_folder, progress=False)
    with pytest.raises(ValueError, match="at most 24 tokens"):
        run_localize(scans, "lungs " * 9, tmp_path / "regions", localizer="clipseg", checkpoint=clipseg_folder, progress=False)
    assert not (tmp_path / "regions").exists()


def test_command_line_ends_with_one_sentence_and_a_code(scans: Path, tmp_path: Path, clipseg_folder: Path, capfd: pytest.CaptureFixture) -> None:
    from mwm.cli import main

    out = str(tmp_path / "regions")
    asked = ["localize", str(scans), "--prompt", "both lungs", "--localizer", "clipseg", "--checkpoint", str(clipseg_folder), "--device", "cpu", "--out", out, "--force"]
    assert main([*asked, "--method", "kmeans"]) == 0
    assert "3 images, 3 computed" in capfd.readouterr().out
    assert main([*asked, "--min-area", "1"]) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("mwm: ") and "matches nothing: 3 of 3 regions are empty" in said
    assert main(["localize", str(scans), "--prompt", "x", "--localizer", "clipseg", "--checkpoint", str(tmp_path / "none"), "--out", out]) == 2
    assert "local folder or a hub name" in capfd.readouterr().err


def test_prompt_sets_negatives_and_settings_come_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from mwm.cli import main

    images, out = str(tmp_path / "xrays"), tmp_path / "regions"
    Path(images).mkdir()
    for path in sorted((demo_folder() / "chest_xray").rglob("*.*g"))[:3]:
        shutil.copy(path, images)
    asked = ["localize", images, "--prompt-set", "chest_xray_lungs:P1", "--not", "left lung", "--fill", "--blur", "0.02", "--components", "1", "--device", "cpu", "--out", str(out)]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "parts: 1.0 a region" in said and "entropy" in said and "check" not in said  # tiny refuses what it does not know: nothing to check
    cache, told = open_regions(out), json.loads((out / "report.json").read_text())
    assert told["images"] == len(cache) and told["share_full"] == 0 and cache.meta["prompt"] == "chest_xray_lungs:P1"
    regions = [cache.region(record) for record in read_list(images)]
    left = [float(region[:, : region.shape[1] // 2].sum() / region.sum()) for region in regions]  # where the patient's right lung is
    assert sum(left) / len(left) > 0.6 and all(0 < float(((region > 0) & (region < 1)).float().mean()) for region in regions)
    assert cache.meta["refine"]["components"] == 1
    run_localize(images, None, tmp_path / "two", prompt_set="chest_xray_lungs:P1", device="cpu", batch_size=1, progress=False)
    assert open_regions(tmp_path / "two").meta["refine"]["components"] == 2  # the set knows that there are two lungs
    assert main([*asked, "--prompt-set", "chest_xray_lung"]) == 2 and "Did you mean chest_xray_lungs" in capsys.readouterr().err
    assert main(["localize", images, "--prompt", "lungs", "--setting", "layer=7", "--out", str(out)]) == 2
    assert "settings of tiny must be left out, since it has none, got layer" in capsys.readouterr().err
    assert main(["localize", images, "--localizer", "edges", "--not", "x", "--out", str(out)]) == 2 and "must read prompts" in capsys.readouterr().err


def test_paths_of_a_list_may_start_from_a_folder_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A refusal said "give root", and there was no such flag."""
    data, words = demo_folder() / "chest_xray", ["--prompt", "both lungs", "--device", "cpu"]
    names = sorted(path.relative_to(data).as_posix() for path in data.rglob("*.*g"))[:3]
    (tmp_path / "list.csv").write_text("file\n" + "\n".join(names) + "\n")
    rooted = [str(tmp_path / "list.csv"), "--root", str(data)]
    assert main(["localize", str(tmp_path / "list.csv"), *words, "--out", str(tmp_path / "regions")]) == 2 and "give root" in capsys.readouterr().err
    assert main(["localize", *rooted, *words, "--out", str(tmp_path / "regions")]) == 0
    assert main(["localize", "check", *rooted, *words, "--out", str(tmp_path / "check")]) == 0
    assert main(["localize", "choose", *rooted, *words, "--vary", "threshold=0.5", "--out", str(tmp_path / "choose")]) == 0
    assert main(["localize", "eval", str(tmp_path / "regions"), *rooted, "--out", str(tmp_path / "eval")]) == 2 and "must have masks" in capsys.readouterr().err
