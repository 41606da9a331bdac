"""What becomes of jobs that fail: a sentence each, and no job takes another along."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mwm.study.cells
from mwm.study.cell_files import Cell, read_facts, write_facts, write_failure
from mwm.study.cells import run_cell, task_config
from mwm.study.config import StudyConfig
from mwm.study.runner import Job, _sentence, run_jobs
from mwm.train import PretrainConfig

CONFIG = {"data": {"drawn": {"index": "drawn/index.csv", "prompt": "body", "folds": 3}}, "blocks": [{"data": "drawn", "arms": ["scratch"], "tasks": ["probe"]}],
          "pretrain": {"encoder": "resnet10t", "image_size": 64, "channels": 1}, "source": {"name": "threshold"}}


def test_a_full_disk_does_not_end_the_other_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mwm.study.runner.write_failure", full)
    jobs = [Job(f"drawn/scratch/{fold}", Cell("drawn", "scratch", fold, ("probe",))) for fold in (0, 1)]  # there are no folds: both fail
    said: list[str] = []
    outcome = run_jobs(jobs, StudyConfig.from_dict(CONFIG), tmp_path, device="cpu", workers=1, threads=1, say=said.append)
    assert sorted(outcome.failed) == ["drawn/scratch/0", "drawn/scratch/1"] and not outcome.left
    assert any("drawn/scratch/0: cell.json cannot be written: [Errno 28] No space left on device" in line for line in said)


def finetune(settings: Any) -> None:
    """A result without training."""
    Path(settings.out).mkdir(parents=True)
    (Path(settings.out) / "metrics.json").write_text("{}")


def test_a_failure_stays_on_record_when_a_later_call_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol: failed runs are listed."""
    cell, config = Cell("drawn", "scratch", 0, ("probe",)), StudyConfig.from_dict(CONFIG)
    for error in ("loss is not finite", "no memory", "no memory"):
        write_failure(cell, config, tmp_path, error)
    assert read_facts(cell.folder(tmp_path))["failed_before"] == ["loss is not finite", "no memory"]
    monkeypatch.setattr(mwm.study.cells, "finetune", finetune)
    facts = run_cell(cell, config, tmp_path, "cpu")
    assert facts["status"] == "done" and facts["error"] is None and facts["failed_before"] == ["loss is not finite", "no memory"]
    assert "failed_before" not in run_cell(Cell("drawn", "scratch", 1, ("probe",)), config, tmp_path, "cpu")


@pytest.mark.parametrize(("problem", "words"), [
    (ValueError("first\nsecond"), "first"), (ValueError(), "ValueError"), (OSError(), "OSError"), (KeyError("x"), "KeyError: 'x'"), (MemoryError(), "MemoryError"),
    (ValueError("Caught UnreadableImage in DataLoader worker process 0.\nOriginal Traceback\nmwm.data.errors.UnreadableImage: a.png cannot be used."), "a.png cannot be used."),
])
def test_every_error_becomes_one_sentence(problem: Exception, words: str) -> None:
    assert _sentence(problem) == words


def test_a_cell_that_another_call_has_finished_keeps_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This call has waited for the lock, and may compute elsewhere."""

    monkeypatch.setattr(mwm.study.cells, "finetune", finetune)
    cell, config = Cell("drawn", "scratch", 0, ("probe",)), StudyConfig.from_dict(CONFIG)
    first = run_cell(cell, config, tmp_path, "cpu")
    write_facts(cell.folder(tmp_path), first | {"device": "a GPU", "commit": "of then"})
    assert run_cell(cell, config, tmp_path, "cpu") == read_facts(cell.folder(tmp_path)) == json.loads(json.dumps(first | {"device": "a GPU", "commit": "of then"}))


@pytest.mark.parametrize(("said", "minutes"), [({}, 3.0), ({"checkpoint_minutes": 5}, 5)])
def test_a_study_in_short_pieces_has_checkpoints_to_go_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, Any], minutes: float) -> None:
    """With ten minutes between them, a pre-training that a budget of nine minutes cuts off began from nothing in every call."""
    settings: list[PretrainConfig] = []
    monkeypatch.setattr(mwm.study.cells, "pretrain", settings.append)
    monkeypatch.setattr(mwm.study.cells, "finetune", finetune)
    config = StudyConfig.from_dict({**CONFIG, "pretrain": {**CONFIG["pretrain"], **said}, "blocks": [{"data": "drawn", "arms": ["uniform60"], "tasks": ["probe"]}]})
    run_cell(Cell("drawn", "uniform60", 0, ("probe",)), config, tmp_path, "cpu")
    assert settings[0].checkpoint_minutes == minutes


def test_an_arm_without_pretraining_has_as_many_channels_as_the_others(tmp_path: Path) -> None:
    """It had looked at the first image of all, a test image where that came first, and pre-training at the first one that it may see."""
    folder = tmp_path / "folds" / "drawn"
    folder.mkdir(parents=True)
    Image.new("RGB", (20, 20), (10, 200, 90)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no picture")
    Image.new("L", (20, 20)).save(folder / "c.png")
    (folder / "0.csv").write_text("file,split,label\na.png,test,x\nb.png,train,y\nc.png,train,x\n")
    (folder / "0.pretrain.csv").write_text("file,split,label\nb.png,train,y\nc.png,train,x\n")
    config = StudyConfig.from_dict({**CONFIG, "pretrain": {"encoder": "resnet10t", "image_size": 64}})
    assert task_config(Cell("drawn", "scratch", 0, ("probe",)), config, tmp_path, tmp_path / "run", "probe", "cpu", None).channels == 1
