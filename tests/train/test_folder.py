"""Who may use the folder of a run: one process at a time, and nothing that is not a run's is removed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mwm.train import PretrainConfig, checkpoint, pretrain, record
from mwm.train.config import TrainError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # protobuf and tensorboard


@pytest.fixture
def short(settings: dict[str, Any]) -> dict[str, Any]:
    """One epoch, no panels."""
    return {**settings, "epochs": 1, "panel_every": 0}


_HOLD = """
import time
from pathlib import Path
from mwm.train import PretrainConfig, record
with record.alone(PretrainConfig(**SETTINGS), continues=CONTINUES):
    Path(FLAG).touch()
    time.sleep(60)
"""


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_process_is_refused_while_the_first_trains(resume: bool, short: dict[str, Any], tmp_path: Path, start_process: Callable) -> None:
    """Both would write one checkpoint, and the later one would remove what the earlier one had written."""
    if resume:
        pretrain(PretrainConfig(**short))
        short["resume"] = True
    before = {path: path.read_bytes() for path in Path(short["out"]).rglob("*") if path.is_file()}
    first = start_process(_HOLD, SETTINGS=short, CONTINUES=resume, FLAG=str(tmp_path / "flag"))
    try:
        while not (tmp_path / "flag").exists():
            assert first.is_alive()
        with pytest.raises(TrainError, match=r"another process trains in .*run at the moment"):
            pretrain(PretrainConfig(**short))
    finally:
        first.kill()
        first.join()
    assert {path: path.read_bytes() for path in before} == before
    pretrain(PretrainConfig(**short))  # the lock ended with the process that was killed


def test_a_run_that_finds_anothers_results_when_it_is_ready_leaves_them(short: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs began at once in an empty folder; the other one was faster."""
    from mwm.train import loop

    ready = loop.prepare

    def late(*arguments: Any) -> Any:
        found = ready(*arguments)
        monkeypatch.setattr(loop, "prepare", ready)
        pretrain(PretrainConfig(**{**short, "seed": 9}))
        return found

    monkeypatch.setattr(loop, "prepare", late)
    with pytest.raises(TrainError, match="holds a run already"):
        pretrain(PretrainConfig(**short))
    assert yaml.safe_load((Path(short["out"]) / "config.yaml").read_text())["seed"] == 9


def test_a_folder_with_a_config_of_another_program_is_not_overwritten(short: dict[str, Any]) -> None:
    out = Path(short["out"])
    out.mkdir()
    (out / "config.yaml").write_text("model: mine\n")
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(TrainError, match="holds other files"):
        pretrain(PretrainConfig(**short, overwrite=True))
    assert (out / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["images", "regions"])
def test_what_a_run_reads_is_not_removed_by_overwrite(name: str, short: dict[str, Any], scans: Path) -> None:
    run = pretrain(PretrainConfig(**short))
    inside = run / "inputs"
    shutil.copytree(scans / ("masks" if name == "regions" else "images"), inside)
    with pytest.raises(TrainError, match=f"{name} must lie outside of a run that is replaced"):
        pretrain(PretrainConfig(**{**short, name: str(inside), "overwrite": True}))
    assert len(list(inside.iterdir())) == len(list((scans / "masks").iterdir()))


def test_a_checkpoint_without_its_settings_is_kept(short: dict[str, Any]) -> None:
    run = pretrain(PretrainConfig(**short))
    (run / "config.yaml").unlink()
    with pytest.raises(TrainError, match=r"has a checkpoint\.pt but no config\.yaml"):
        pretrain(PretrainConfig(**short, resume=True))
    assert (run / checkpoint.NAME).is_file()


def test_a_folder_that_cannot_be_made_is_told_before_images_are_read(short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mwm.train import prepare

    monkeypatch.setattr(prepare, "survey", lambda *_, **__: pytest.fail("images were read"))
    (tmp_path / "file").touch()
    with pytest.raises(TrainError, match="out must be a folder that can be made and written"):
        pretrain(PretrainConfig(**{**short, "out": str(tmp_path / "file" / "run")}))


def test_names_that_are_no_utf8_are_listed_and_do_not_end_the_run(short: dict[str, Any], scans: Path, tmp_path: Path) -> None:
    """Umlauts of older systems, in a file that cannot be read and in the folder's own name."""
    images = os.fsencode(tmp_path) + b"/B\xfccher"
    shutil.copytree(os.fsencode(scans / "images"), images)
    try:
        (Path(os.fsdecode(images)) / os.fsdecode(b"kaputt_\xfc.png")).write_bytes(b"no image")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    run = pretrain(PretrainConfig(**{**short, "images": os.fsdecode(images)}))
    assert "kaputt_\\udcfc.png" in (run / "skipped.csv").read_text()
    again = pretrain(PretrainConfig.from_run(run))
    assert PretrainConfig.from_run(again).images == os.fsdecode(images)


def test_regions_may_move_and_must_stay_the_same(short: dict[str, Any], scans: Path, tmp_path: Path) -> None:
    regions = tmp_path / "regions"
    shutil.copytree(scans / "masks", regions)
    config = PretrainConfig(**{**short, "regions": str(regions)})
    run = pretrain(config)
    shutil.move(regions, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="must be a folder of regions or masks, which is not there"):
        pretrain(PretrainConfig.from_run(run))
    moved = PretrainConfig.from_run(run, regions=str(tmp_path / "elsewhere"))
    pretrain(moved)
    assert PretrainConfig.from_run(run).regions == moved.regions
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "elsewhere", other)
    shutil.copy(other / "scan_00.png", other / "scan_01.png")
    with pytest.raises(TrainError, match="regions are not those the run began with"):
        pretrain(replace(moved, regions=str(other)))


def test_a_leftover_lock_is_no_run(short: dict[str, Any]) -> None:
    out = Path(short["out"])
    out.mkdir()
    (out / record._LOCK).touch()
    assert not record.check_folder(PretrainConfig(**short))
