"""`mwm study` as a user runs it: cells, a kill, a failing arm, budget, shares under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tests.transfer.drawn import rows_with_patients, write_index

from mwm.cli import main
from mwm.study.cell_files import Cell, finished, read_facts, write_failure
from mwm.study.cells import run_cell
from mwm.study.command import StudyOptions, _resources, study
from mwm.study.config import StudyConfig
from mwm.study.errors import StudyError
from mwm.study.runner import Outcome, jobs_of

VALUES = {
    "data": {"drawn": {"index": "drawn/index.csv", "prompt": "body", "folds": 3}},
    "blocks": [{"data": "drawn", "arms": ["region", "scratch"], "tasks": ["probe"]}],
    "pretrain": {"encoder": "resnet10t", "image_size": 64, "channels": 1, "epochs": 2, "batch_size": 16, "decoder_width": 32, "cache": "device", "workers": 0},
    "finetune": {"probe": {"bootstrap": 20}},
    "source": {"name": "threshold"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small data set."""
    folder = tmp_path_factory.mktemp("data")
    write_index(folder / "drawn", rows_with_patients(18, 2))
    return folder


def command(config: Path, root: Path, out: Path, *more: str) -> list[str]:
    """The words of a study in a process of its own."""
    return [sys.executable, "-m", "mwm", "study", str(config), "--root", str(root), "--out", str(out), "--device", "cpu", "--threads", "1", *more]


def test_a_killed_study_goes_on_and_repeats_nothing(root: Path, tmp_path: Path) -> None:
    config, out = tmp_path / "study.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(VALUES))
    first = subprocess.Popen(command(config, root, out, "--workers", "1", "--only", "/0"), start_new_session=True)
    run = out / "cells" / "drawn" / "region" / "0" / "run"
    deadline = time.monotonic() + 120
    while not (run / "config.yaml").exists() and time.monotonic() < deadline:
        assert first.poll() is None
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)  # the study alone; its worker must follow
    first.wait()
    done = subprocess.run(command(config, root, out, "--workers", "1", "--only", "/0"), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr + (out / "workers.log").read_text()
    cells = [Cell("drawn", arm, 0, ("probe",)) for arm in ("region", "scratch")]
    study_config = StudyConfig.from_dict(VALUES)
    assert all(finished(cell, out, study_config) for cell in cells)
    facts = read_facts(cells[0].folder(out))
    assert facts["status"] == "done" and 0.4 < facts["hidden_share"] < 0.8 and facts["wall_seconds"]["probe"] > 0
    assert not facts["uses_labels"] and not facts["supervised_region_source"]
    assert not list(run.glob("checkpoint*")) and (run / "encoder.safetensors").is_file()
    times = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.json")}
    again = subprocess.run(command(config, root, out, "--workers", "1", "--only", "/0"), capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0 and "2 cells, 2 of them done; 0 to run" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob("metrics.json")} == times
    changed = StudyConfig.from_dict({**VALUES, "pretrain": {**VALUES["pretrain"], "epochs": 3}})
    with pytest.raises(StudyError, match="belongs to a study with other settings in pretrain"):
        study(changed, StudyOptions(str(out), str(root), device="cpu"))


def test_a_failing_arm_is_listed_and_stops_no_other(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [{"data": "drawn", "arms": ["imagenet", "scratch"], "tasks": ["probe"]}]
    config = StudyConfig.from_dict({**VALUES, "blocks": blocks})
    wrong = tmp_path / "weights.safetensors"
    wrong.write_bytes(b"no weights")
    outcome = study(config, StudyOptions(str(tmp_path / "out"), str(root), device="cpu", workers=1, threads=1, weights=str(wrong), only="/1"))
    assert list(outcome.failed) == ["drawn/imagenet/1"] and outcome.ended["drawn/scratch/1"] is None
    facts = json.loads((tmp_path / "out" / "cells" / "drawn" / "imagenet" / "1" / "cell.json").read_text())
    assert facts["status"] == "failed" and "weights" in facts["error"]
    assert "failed twice" in capsys.readouterr().out


def test_results_of_other_settings_are_not_taken_for_those_of_now(tmp_path: Path) -> None:
    cell, config = Cell("drawn", "scratch", 0, ("probe",)), StudyConfig.from_dict(VALUES)
    folder = cell.folder(tmp_path)
    (folder / "probe").mkdir(parents=True)
    (folder / "probe" / "metrics.json").write_text("{}")
    (folder / "cell.json").write_text(json.dumps({"status": "done", "config_hash": "of an older arm"}))
    for _ in range(2):
        with pytest.raises(StudyError, match="must have been run with the settings of now"):
            run_cell(cell, config, tmp_path, "cpu")
        write_failure(cell, config, tmp_path, "refused")  # as the runner does; the next call must refuse again


def test_without_time_no_cell_begins_and_all_are_left(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = study(StudyConfig.from_dict(VALUES), StudyOptions(str(tmp_path / "out"), str(root), device="cpu", budget=0.0))
    assert not outcome.ended and len([name for name in outcome.left if name.startswith("drawn/")]) == 6
    assert "the same command goes on" in capsys.readouterr().out


def test_processes_under_torchrun_share_the_cells(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        outcome = study(StudyConfig.from_dict(VALUES), StudyOptions(str(tmp_path / "out"), str(root), device="cpu", budget=0.0))
        left.append({name for name in outcome.left if name.startswith("drawn/")})
    assert not left[0] & left[1] and len(left[0] | left[1]) == 6


def test_shares_under_torchrun_stay_the_same_while_cells_end(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    options, left = StudyOptions(str(tmp_path / "out"), str(root), device="cpu", budget=0.0), []
    for rank, done in (("0", set()), ("1", {"drawn/region/0"})):  # the first process has ended a cell before the second one looks
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr("mwm.study.command.finished", lambda cell, out, config, weights, done=done: cell.name in done)
        left.append({name for name in study(StudyConfig.from_dict(VALUES), options).left if name.startswith("drawn/")})
    assert not left[0] & left[1] and len(left[0] | left[1]) == 6


def test_a_failed_cell_ends_no_other_process_of_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(VALUES))
    monkeypatch.setattr("mwm.study.command.study", lambda config, options: Outcome({"drawn/region/0": "no memory"}))
    words = ["study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")]
    assert main(words) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words) == 0


def test_each_process_of_torchrun_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert _resources(StudyOptions("out", device="cuda"))[0] == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [_resources(StudyOptions("out", device=name))[0] for name in ("auto", "cuda", "cuda:0")] == ["cuda:1", "cuda:1", "cuda:0"]


def test_an_unknown_device_is_refused_by_the_study() -> None:
    with pytest.raises(StudyError, match=r"^study: device must be auto, cpu, cuda or cuda:N, got 'teapot'"):
        _resources(StudyOptions("out", device="teapot"))


def test_regions_that_arms_share_come_first_and_once() -> None:
    cells = [Cell("drawn", arm, fold, ("probe",)) for arm in ("region", "uniform", "scratch") for fold in (0, 1)]
    jobs = jobs_of(cells, StudyConfig.from_dict(VALUES))
    assert [job.name for job in jobs] == ["regions drawn/0", "drawn/region/0", "regions drawn/1", "drawn/region/1", "drawn/uniform/0", "drawn/uniform/1",
                                          "drawn/scratch/0", "drawn/scratch/1"]
    assert jobs[4].after == {"regions drawn/0"} and not jobs[6].after


def test_a_rehearsal_binds_to_no_settings_and_says_that_patients_are_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_index(tmp_path / "drawn", [{**row, "patient": ""} for row in rows_with_patients(18, 1)])
    values = {**VALUES, "blocks": [{"data": "drawn", "arms": ["scratch"], "tasks": ["probe"]}]}
    study(StudyConfig.from_dict(values), StudyOptions(str(tmp_path / "out"), root=str(tmp_path), device="cpu", workers=1, threads=1, dry_run=True))
    assert "drawn has rows without a patient" in capsys.readouterr().out and not (tmp_path / "out" / "study.yaml").exists()
    fewer = {**values, "pretrain": {**VALUES["pretrain"], "epochs": 1}}
    study(StudyConfig.from_dict(fewer), StudyOptions(str(tmp_path / "out"), root=str(tmp_path), device="cpu", workers=1, threads=1, only="/0"))
    with pytest.raises(StudyError, match="other settings in pretrain"):
        study(StudyConfig.from_dict(values), StudyOptions(str(tmp_path / "out"), root=str(tmp_path), device="cpu", workers=1, threads=1, dry_run=True))
