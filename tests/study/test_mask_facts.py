"""What masks hid of the true regions: counted on the views that pre-training saw."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))  # import-mode importlib does not; drawn_regions.py is shared
from drawn_regions import write_set

from mwm.cli import main
from mwm.masking import inside_grid
from mwm.study.cell_files import Cell
from mwm.study.cells import run_cell
from mwm.study.config import StudyConfig
from mwm.study.folds import write_folds
from mwm.study.mask_facts import EPOCHS, hidden_inside, mask_facts
from mwm.study.report import report
from mwm.train import PretrainConfig
from mwm.train.masks import create_policy
from mwm.train.prepare import list_images, prepare

VALUES = {"data": {"drawn": {"index": "drawn/index.csv", "prompt": "disc", "folds": 3}},
          "blocks": [{"data": "drawn", "arms": ["roi", "shuffled", "uniform60", "scratch"], "tasks": ["probe"]}],
          "pretrain": {"encoder": "resnet10t", "image_size": 128, "channels": 1, "epochs": EPOCHS, "batch_size": 8, "decoder_width": 32, "cache": "device", "workers": 0},
          "finetune": {"probe": {"bootstrap": 20}}, "source": {"name": "masks"}}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_set(folder / "drawn")
    write_folds(folder / "drawn", folder / "out", folds=3, merge_alike=False)
    config = StudyConfig.from_dict(VALUES)
    for arm in ("roi", "shuffled", "uniform60", "scratch"):
        run_cell(Cell("drawn", arm, 0, ("probe",)), config, folder / "out", "cpu")
    return folder / "out"


def test_the_counts_are_those_of_the_views_that_were_trained_on(out: Path) -> None:
    """The hidden share by the run's own account and by this count are of the same masks: as many epochs, all images."""
    for row in mask_facts(out):
        with (out / "cells" / "drawn" / row["arm"] / "0" / "run" / "metrics.csv").open() as file:
            steps = [float(step["hidden_share"]) for step in csv.DictReader(file)]
        assert row["hidden"] == pytest.approx(sum(steps) / len(steps), abs=0.02)  # the last images of an epoch may not fill a step
        assert 0 < row["patches_inside"] < row["patches"] == 16 and row["images"] > 10


def test_arms_differ_where_they_should(out: Path) -> None:
    facts = {row["arm"]: row for row in mask_facts(out)}
    assert set(facts) == {"roi", "shuffled", "uniform60"}
    assert facts["roi"]["hidden_inside"] > 0.6 > facts["roi"]["hidden"] + 0.05
    assert abs(facts["uniform60"]["hidden_inside"] - 0.6) < 0.1
    assert facts["shuffled"]["hidden_inside"] < facts["roi"]["hidden_inside"] - 0.05


class _AllInside:
    """Hides all patches of the region and no other."""

    needs_region = True

    def __call__(self, region, *, grid, seed, ids, epoch):
        return ~inside_grid(region, grid)[0]


def test_what_is_hidden_of_a_region_is_its_area_in_hidden_patches(tmp_path: Path) -> None:
    """Against a count by hand: no crops, one region, a mask that is known."""
    write_set(tmp_path / "drawn", patients=4, images=2)
    config = PretrainConfig(images=str(tmp_path / "drawn" / "index.csv"), out=str(tmp_path / "run"), regions="masks", mask="region", image_size=128, channels=1,
                            crop_scale=(1.0, 1.0), flip=False, batch_size=4, workers=0, encoder="resnet10t", split=None)
    facts = hidden_inside(config, _AllInside())
    source = prepare(list_images(config), None, 1).source()
    shares, patches = [], []
    for k in range(len(source)):
        region = source[k]["region"]
        cover = region.reshape(4, 32, 4, 32).mean((1, 3))
        inside = cover >= 0.25  # all of these and none of the others is hidden
        shares.append(float(cover[inside].sum() / cover.sum()))
        patches.append(int(inside.sum()))
    assert facts["hidden_inside"] == pytest.approx(sum(shares) / len(shares), abs=5e-3)  # coverage counts in steps of 1/255
    assert facts["patches_inside"] == pytest.approx(sum(patches) / len(patches)) and facts["hidden"] == pytest.approx(sum(patches) / len(patches) / 16)


def test_the_table_shows_them_and_keeps_them(out: Path) -> None:
    text = (report(StudyConfig.from_dict(VALUES), out, rounds=20) / "tables.md").read_text()
    assert "### drawn: what the masks hid" in text and "| `roi` | 1 |" in text and (out / "report" / "masks.csv").read_text().count("\n") == 4
    before = mask_facts(out)
    (out / "regions").rename(out / "moved")
    assert mask_facts(out) == before
    (out / "mask_facts" / "drawn" / "0" / "shuffled.json").unlink()
    assert [row["arm"] for row in mask_facts(out)] == ["roi", "uniform60"]  # without the regions they cannot be drawn again
    (out / "moved").rename(out / "regions")
    assert [row["arm"] for row in mask_facts(out, draw=False)] == ["roi", "uniform60"]
    assert mask_facts(out) == before


def test_masks_drawn_ahead_are_those_of_the_runs(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "study.yaml"
    config.write_text(yaml.safe_dump(VALUES))
    assert main(["study", str(config), "--root", str(out.parent), "--out", str(tmp_path / "ahead"), "--device", "cpu", "--only", "/0", "--masks"]) == 0
    said = capsys.readouterr().out
    assert "| `roi` | 1 |" in said and "drawn/scratch" not in said and not (tmp_path / "ahead" / "cells").exists()
    for row in mask_facts(out):
        assert json.loads((tmp_path / "ahead" / "mask_facts" / "drawn" / "0" / f"{row['arm']}.json").read_text()) == row
    assert f"drawn/roi/0: {mask_facts(out)[0]['hidden']:.3f} of the patches hidden" in said
    assert main(["study", str(config), "--out", str(tmp_path / "ahead"), "--masks", "--dry-run"]) == 2


def test_data_without_masks_have_no_such_table(tmp_path: Path) -> None:
    write_set(tmp_path / "drawn", patients=4, images=2, mask_of=())
    config = PretrainConfig(images=str(tmp_path / "drawn" / "index.csv"), out=str(tmp_path / "run"), mask="uniform", mask_ratio=0.5, image_size=64, channels=1,
                            batch_size=4, split=None)
    assert hidden_inside(config, create_policy(config)) == {"images": 0}
    assert mask_facts(tmp_path) == []
