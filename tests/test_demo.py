"""The demo runs from start to end, and what it shows is what it claims."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mwm.demo.page import DISCLAIMER
from mwm.demo.probe import split_by_patient
from mwm.demo.race import DENSE, MASKED, run_race
from mwm.demo.regions import draw, locate_shown, policies, prompts_sheet
from mwm.demo.scans import PROMPTS, Scans, load_scans

PICTURES = ("1_prompts", "2_prompt_to_mask", "3_uniform_and_region", "4_hidden_shares", "5_loss", "6_reconstruction", "7_probe")


@pytest.fixture(scope="module")
def scans() -> Scans:
    return load_scans()


@pytest.fixture(scope="module")
def localizer():
    import mwm

    return mwm.create_localizer("tiny")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of `mwm demo --quick`."""
    out = tmp_path_factory.mktemp("demo") / "out"
    done = subprocess.run([sys.executable, "-m", "mwm", "demo", "--quick", "--out", str(out)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out, done.stdout


def test_quick_demo_leaves_report_and_pictures(demo: tuple[Path, str]) -> None:
    out, text = demo
    for name in PICTURES:
        with Image.open(out / f"{name}.png") as picture:
            assert picture.width > 400, name
    assert (out / "run" / "encoder.safetensors").exists()
    assert str(out / "report.html") in text and "mwm pretrain" in text.split("Done in")[1]


def test_report_needs_no_network_and_says_what_it_is_worth(demo: tuple[Path, str]) -> None:
    page = (demo[0] / "report.html").read_text()
    assert set(re.findall(r'(?:src|href)="([^"#][^":]*:)', page)) == {"data:"}
    assert "<script" not in page and DISCLAIMER in page and "still running" not in page
    assert "AUROC" in page and "95 %" in page and "CC BY" in page


def test_probe_is_printed_with_n_and_interval_for_all_three_rivals(demo: tuple[Path, str]) -> None:
    rows = re.findall(r"(pre-trained encoder|untrained encoder|pixel statistics) +AUROC (\d\.\d+) +\(95 % interval (\d\.\d+) to (\d\.\d+), n = (\d+)\)", demo[1])
    assert [row[0] for row in rows] == ["pre-trained encoder", "untrained encoder", "pixel statistics"]
    assert all(float(low) <= float(value) <= float(high) and int(n) >= 30 for _, value, low, high, n in rows)


def test_the_same_xray_under_three_prompts_marks_left_both_and_nothing(scans: Scans, localizer) -> None:
    shares = dict(prompts_sheet(scans, localizer)[1])
    assert 0.3 * shares["both lungs"] < shares["left lung"] < 0.7 * shares["both lungs"]
    assert shares["both lungs"] > 0.1 and shares["brain tumour"] < 0.01


def test_uniform_and_region_masks_leave_equally_many_patches_visible(scans: Scans, localizer) -> None:
    shown = locate_shown(scans, localizer)
    region, uniform = (draw(policy, shown) for policy in policies())
    assert region.flatten(1).sum(1).tolist() == uniform.flatten(1).sum(1).tolist()
    assert not torch.equal(region, uniform)


def _thumbnail(path: Path) -> np.ndarray:
    """32 x 32 grey values, without mean and of length 1."""
    with Image.open(path) as image:
        values = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), np.float32).ravel()
    values = values - values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-6)


def test_no_shipped_scan_trained_the_localizer(scans: Scans, data_root: Path) -> None:
    # Shipped scans have names and sizes of their own, so that only the pixels tell where each comes from.
    for kind in PROMPTS:
        with (data_root / kind / "index.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        known = np.stack([_thumbnail(data_root / kind / row["file"]) for row in rows])
        trained = np.array([row["split"] == "train" for row in rows])
        shipped = np.stack([_thumbnail(record.path) for record in scans.records if record.name.startswith(kind)])
        alike = shipped @ known.T
        assert len(shipped) > 20 and alike.max(1).min() > 0.98, "every shipped scan is found again"
        assert not trained[alike.argmax(1)].any() and alike[:, trained].max() < 0.98


def test_probe_patients_are_disjoint_and_both_labels_are_on_both_sides(scans: Scans) -> None:
    _, labels, patients = scans.probed()
    fit = split_by_patient(patients, labels)
    people = np.array(patients)
    assert not set(people[fit]) & set(people[~fit])
    assert set(labels[fit]) == set(labels[~fit]) == {0, 1}
    assert abs(fit.mean() - 0.5) < 0.1


def test_race_finds_packed_tiles_equal_to_mask_multiply() -> None:
    active = torch.rand(2, 4).argsort(1).view(2, 2, 2) < 2
    race = run_race(torch.rand(2, 1, 64, 64), active, budget=0.0)
    assert race.difference < 1e-4
    assert race.pairs == 3 and race.ratios.keys() == {DENSE, MASKED} and race.hidden == 0.5
