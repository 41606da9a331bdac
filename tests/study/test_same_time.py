"""The arm that pre-trains as long as another one: its epochs, what it waits for, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.transfer.drawn import rows_with_patients, write_index

import mwm.study.cells
from mwm.study.analysis import Plan
from mwm.study.cell_files import Cell, read_facts
from mwm.study.cells import run_cell
from mwm.study.command import StudyOptions, study
from mwm.study.config import StudyConfig
from mwm.study.errors import StudyError
from mwm.study.folds import write_folds
from mwm.study.rehearse import clock, rehearse
from mwm.study.runner import Outcome, jobs_of
from mwm.study.same_time import needed, scaled_epochs, waiting
from mwm.study.sources import ARMS, arm

TIMED = Cell("drawn", "uniform60_time", 0, ("probe",))


def config(*arms: str) -> StudyConfig:
    """A study of one drawn data set."""
    return StudyConfig.from_dict({"data": {"drawn": {"index": "drawn/index.csv", "prompt": "body", "folds": 3}}, "source": {"name": "threshold"},
                                  "blocks": [{"data": "drawn", "arms": list(arms), "tasks": ["probe"]}],
                                  "pretrain": {"encoder": "resnet10t", "image_size": 64, "channels": 1, "epochs": 40, "decoder_width": 32}})


def timed(out: Path, arm: str, step_ms: float, **more: Any) -> None:
    """A finished cell of fold 0 with a step time."""
    folder = Cell("drawn", arm, 0, ()).folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cell.json").write_text(json.dumps({"status": "done", "step_ms": step_ms, "device": "cpu", **more}))


def test_it_takes_the_masks_of_one_arm_and_the_time_of_the_other(tmp_path: Path) -> None:
    assert arm("uniform60_time").settings == arm("uniform60").settings and [one.arm for one in needed(TIMED)] == ["region", "uniform60"]
    assert not any(one.time_of for name, one in ARMS.items() if name != "uniform60_time") and ("region", "uniform60_time") in Plan().contrasts
    timed(tmp_path, "region", 120.0)
    timed(tmp_path, "uniform60", 80.0)
    assert scaled_epochs(TIMED, tmp_path, 40) == {"epochs": 60, "time_of": {"region": 120.0, "uniform60": 80.0}}
    timed(tmp_path, "uniform60", 119.0)
    assert scaled_epochs(TIMED, tmp_path, 40)["epochs"] == 40
    timed(tmp_path, "uniform60", 1e6)
    assert scaled_epochs(TIMED, tmp_path, 40)["epochs"] == 1


def test_an_interrupted_run_keeps_its_number_of_epochs(tmp_path: Path) -> None:
    timed(tmp_path, "region", 120.0)
    timed(tmp_path, "uniform60", 80.0)
    run = TIMED.folder(tmp_path) / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("epochs: 57\n")
    assert scaled_epochs(TIMED, tmp_path, 40)["epochs"] == 57


def test_missing_step_times_and_those_of_two_devices_are_refused(tmp_path: Path) -> None:
    timed(tmp_path, "region", 120.0)
    with pytest.raises(StudyError, match=r"^study: drawn/uniform60_time/0 takes as long as region, so that drawn/uniform60/0 must have been pre-trained before, got no step time"):
        scaled_epochs(TIMED, tmp_path, 40)
    timed(tmp_path, "uniform60", 80.0, device="another")
    with pytest.raises(StudyError, match="must be of one device, got cpu and another"):
        scaled_epochs(TIMED, tmp_path, 40)


def test_it_runs_after_the_arms_of_its_fold() -> None:
    cells = [Cell("drawn", name, fold, ("probe",)) for name in ("uniform60_time", "region", "uniform60") for fold in (0, 1)]
    jobs = {job.name: job.after for job in jobs_of(cells, config("region"))}
    assert jobs["drawn/uniform60_time/1"] == {"drawn/region/1", "drawn/uniform60/1"}


def test_it_waits_for_arms_that_do_not_run_now_and_refuses_a_study_without_them(tmp_path: Path) -> None:
    cells = [Cell("drawn", name, 0, ("probe",)) for name in ("region", "uniform60", "uniform60_time")]
    names = [cell.name for cell in cells]
    assert waiting(cells, tmp_path, names, names) == []
    assert waiting(cells, tmp_path, ["drawn/region/0"], names) == [TIMED]
    with pytest.raises(StudyError, match="the study must have the arm uniform60 on drawn"):
        waiting(cells, tmp_path, names, ["drawn/region/0"])
    timed(tmp_path, "region", 1.0)
    timed(tmp_path, "uniform60", 1.0)
    assert waiting(cells, tmp_path, [], []) == []


def test_the_study_says_what_it_waits_for_and_pretrains_with_the_epochs_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_index(tmp_path / "drawn", rows_with_patients(18, 2))
    out, plan, ran = tmp_path / "out", config("region", "uniform60", "uniform60_time"), []
    monkeypatch.setattr("mwm.study.command.run_jobs", lambda jobs, *a, **k: ran.extend(jobs) or Outcome())
    outcome = study(plan, StudyOptions(str(out), str(tmp_path), device="cpu", only="uniform60_time/0"))
    assert outcome.left == ["drawn/uniform60_time/0"] and not ran
    assert "drawn/uniform60_time/0 waits until region and uniform60 of its fold are pre-trained" in capsys.readouterr().out
    timed(out, "region", 120.0)
    timed(out, "uniform60", 80.0)
    write_folds(tmp_path / "drawn", out, name="drawn", folds=3)
    epochs = []

    def pretrain(settings: Any) -> None:  # one that was interrupted, and had spent 90 seconds before
        epochs.append(settings.epochs)
        Path(settings.out).mkdir()
        (Path(settings.out) / "run.json").write_text(json.dumps({"status": "finished", "wall_time_seconds": 90.5}))

    monkeypatch.setattr(mwm.study.cells, "pretrain", pretrain)
    monkeypatch.setattr(mwm.study.cells, "finetune", lambda settings: None)
    run_cell(TIMED, plan, out, "cpu")
    facts = read_facts(TIMED.folder(out))
    assert epochs == [60] and facts["epochs"] == 60 and facts["wall_seconds"]["pretrain"] == 90.5


def test_the_dry_run_counts_a_pretraining_once_and_gives_equal_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spent = {"region": 100.0, "uniform60": 70.0, "uniform60_time": 70.0}
    monkeypatch.setattr("mwm.study.rehearse._one", lambda config, cell, *a: print("regions: 30 images") or {"pretrain": spent[cell.arm], **dict.fromkeys(cell.tasks, 1.0)})
    blocks = (("region", ("probe",)), ("uniform60", ("probe",)), ("uniform60_time", ("probe",)), ("region", ("detect", "segment")))
    cells = [Cell("drawn", name, fold, tasks) for name, tasks in blocks for fold in (0, 1)]
    said = rehearse(config("region"), cells, tmp_path, tmp_path, device="cpu", workers=1, threads=torch.get_num_threads())
    assert said.startswith(f"6 cells: {clock(2 * (100 + 70 + 100 + 5))} in one process")  # two folds; five tasks of a second
    assert "regions: 30 images" not in (printed := capsys.readouterr().out) and len(printed.splitlines()) == 4
