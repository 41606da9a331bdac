"""Settings of one task of a study: brought by a block or added later; those of a task with results stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.transfer.drawn import rows_with_patients, write_index

import mwm.study.cells
import mwm.study.command
from mwm.study.cell_files import Cell, finished, read_facts, write_facts
from mwm.study.cells import run_cell, task_config
from mwm.study.command import StudyOptions, study
from mwm.study.config import StudyConfig
from mwm.study.errors import StudyError
from mwm.study.runner import Job, Outcome
from mwm.transfer import TransferError
from mwm.transfer.tasks import state_file

STUDIES = Path(__file__).resolve().parents[2] / "studies"


def values(*blocks: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A study of one drawn data set."""
    return {"data": {"drawn": {"index": "drawn/index.csv", "prompt": "body", "folds": 3}}, "pretrain": {"encoder": "resnet10t", "image_size": 64, "channels": 1},
            "source": {"name": "threshold"}, "finetune": {"probe": {"bootstrap": 20}, "classify": {"epochs": 2}},
            "blocks": [{"data": "drawn", "arms": ["scratch"], **b} for b in blocks], **more}


FIRST = {"tasks": ["probe", "classify"]}
LATER = {"tasks": ["segment"], "finetune": {"segment": {"epochs": 3}}}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Fine-tuning that writes its settings as result; (task, settings) of every call, cells in this process."""
    calls: list[tuple[str, Any]] = []

    def finetune(settings: Any) -> None:
        calls.append((Path(settings.out).name, settings))
        Path(settings.out).mkdir(parents=True)
        (Path(settings.out) / "metrics.json").write_text(json.dumps({"epochs": settings.epochs, "bootstrap": settings.bootstrap}))

    def run_jobs(jobs: list[Job], config: StudyConfig, out: Path, *, device: str, **_: Any) -> Outcome:
        for job in jobs:
            run_cell(job.cell, config, out, device)
        return Outcome({job.name: None for job in jobs})

    monkeypatch.setattr(mwm.study.cells, "finetune", finetune)
    monkeypatch.setattr(mwm.study.command, "run_jobs", run_jobs)
    monkeypatch.setattr(mwm.study.command, "write_report", lambda config, out, **_: out)
    return calls


@pytest.fixture
def options(tmp_path: Path) -> StudyOptions:
    write_index(tmp_path / "data" / "drawn", rows_with_patients(18, 2))
    return StudyOptions(str(tmp_path / "out"), str(tmp_path / "data"), device="cpu", only="drawn/scratch/0")


def folder(options: StudyOptions) -> Path:
    return Path(options.out) / "cells" / "drawn" / "scratch" / "0"


def as_before(options: StudyOptions) -> None:
    """cell.json as it was written before it told tasks apart."""
    facts = read_facts(folder(options))
    write_facts(folder(options), {name: value for name, value in facts.items() if name not in ("base_hash", "task_hashes")})


def test_what_blocks_say_is_in_no_fingerprint_of_a_cell() -> None:
    """The studies here as they are, and with a block that brings settings: every cell keeps its fingerprint to the byte."""
    plain = {"cpu": {("brain_mri", "uniform"): "64b86aa0e69c93ba", ("chest_xray", "region"): "1656c37ab9db561f"}, "main": {("brain_mri", "scratch"): "8bea28891fa2fc71"}}
    for name, cells in plain.items():
        config = StudyConfig.from_yaml(STUDIES / f"{name}.yaml")
        assert "finetune" not in str(config.to_dict()["blocks"])
        more = config.to_dict()
        more["blocks"].append({"data": "chest_xray", "arms": ["uniform"], "tasks": ["detect"], "finetune": {"detect": {"epochs": 7}}})
        added = StudyConfig.from_dict(more)
        assert StudyConfig.from_dict(added.to_dict()) == added
        assert {cell: config.fingerprint(*cell) for cell in cells} == {cell: added.fingerprint(*cell) for cell in cells} == cells


def test_a_later_block_brings_its_own_settings_and_no_finished_task_runs_again(options: StudyOptions, ran: list) -> None:
    study(StudyConfig.from_dict(values(FIRST)), options)
    as_before(options)
    config = StudyConfig.from_dict(values(FIRST, LATER))
    study(config, options)
    assert [(task, settings.epochs) for task, settings in ran[1:]] == [("classify", 2), ("segment", 3)]
    assert all(finished(Cell("drawn", "scratch", 0, tasks), Path(options.out), config) for tasks in (("probe", "classify"), ("segment",)))
    study(config, options)
    assert len(ran) == 3


def test_settings_of_an_added_task_leave_finished_cells_as_they_are(options: StudyOptions, ran: list) -> None:
    """They had been refused, because they are in the fingerprint of all cells."""
    study(StudyConfig.from_dict(values(FIRST)), options)
    as_before(options)
    config = StudyConfig.from_dict(values(FIRST, {"tasks": ["segment"]}, finetune={"probe": {"bootstrap": 20}, "classify": {"epochs": 2}, "segment": {"epochs": 3}}))
    study(config, options)
    assert [task for task, _ in ran] == ["probe", "classify", "segment"]


@pytest.mark.parametrize("old", [True, False], ids=["cells of before", "cells of now"])
@pytest.mark.parametrize("where", ["study", "block"])
def test_settings_of_a_task_that_has_results_may_not_change(options: StudyOptions, ran: list, old: bool, where: str) -> None:
    first = StudyConfig.from_dict(values(FIRST))
    study(first, options)
    if old:
        as_before(options)
    said = (Path(options.out) / "study.yaml").read_text()
    block = {**FIRST, "finetune": {"classify": {"epochs": 5}}}
    changed = values(FIRST, finetune={"probe": {"bootstrap": 20}, "classify": {"epochs": 5}}) if where == "study" else values(block)
    with pytest.raises(StudyError, match="classify of drawn/scratch/0 must have been run with the settings of now, got results of others"):
        study(StudyConfig.from_dict(changed), options)
    assert len(ran) == 2 and (Path(options.out) / "study.yaml").read_text() == said
    study(first, options)
    assert len(ran) == 2 and finished(Cell("drawn", "scratch", 0, ("probe", "classify")), Path(options.out), first)


def test_the_same_settings_may_be_said_by_the_study_or_by_a_block(options: StudyOptions, ran: list) -> None:
    study(StudyConfig.from_dict(values({**FIRST, "finetune": {"probe": {"bootstrap": 30}}})), options)
    study(StudyConfig.from_dict(values(FIRST, finetune={"probe": {"bootstrap": 30}, "classify": {"epochs": 2}})), options)
    assert len(ran) == 2


def test_a_cell_that_is_run_by_itself_refuses_results_of_other_settings_of_a_task(options: StudyOptions, ran: list) -> None:
    study(StudyConfig.from_dict(values(FIRST)), options)
    config = StudyConfig.from_dict(values({**FIRST, "finetune": {"probe": {"bootstrap": 30}}}))
    cell = Cell("drawn", "scratch", 0, ("probe", "classify"))
    assert not finished(cell, Path(options.out), config)
    with pytest.raises(StudyError, match="probe of drawn/scratch/0 must have been run with the settings of now"):
        run_cell(cell, config, Path(options.out), "cpu")


def test_settings_of_a_task_that_has_been_begun_may_not_change(options: StudyOptions, ran: list, monkeypatch: pytest.MonkeyPatch) -> None:
    working = mwm.study.cells.finetune

    def killed(settings: Any) -> None:
        if Path(settings.out).name == "classify":
            state_file(Path(settings.out)).write_text("half")
            raise KeyboardInterrupt
        working(settings)

    monkeypatch.setattr(mwm.study.cells, "finetune", killed)
    with pytest.raises(KeyboardInterrupt):
        study(StudyConfig.from_dict(values(FIRST)), options)
    monkeypatch.setattr(mwm.study.cells, "finetune", working)
    with pytest.raises(StudyError, match="classify of drawn/scratch/0"):
        study(StudyConfig.from_dict(values(FIRST, finetune={"probe": {"bootstrap": 20}, "classify": {"epochs": 5}})), options)
    assert state_file(folder(options) / "classify").is_file()


@pytest.mark.parametrize(("block", "error", "words"), [
    ({**LATER, "finetune": [1]}, StudyError, "block.finetune must be a mapping"),
    ({**LATER, "finetune": {"detect": {}}}, StudyError, "block.finetune must be by task: segment, got 'detect'"),
    ({**LATER, "finetune": {"segment": 3}}, StudyError, "block.finetune.segment must be a mapping"),
    ({**LATER, "finetune": {"segment": {"epoch": 3}}}, StudyError, "Did you mean 'epochs'"),
    ({**LATER, "finetune": {"segment": {"seed": 3}}}, StudyError, "which the study sets"),
    ({**LATER, "finetune": {"segment": {"epochs": 0}}}, TransferError, "epochs must be"),
    ({"tasks": ["probe"], "finetune": {"probe": {"bootstrap": 9}}}, StudyError, "block.finetune.probe must be as in the first block with probe of scratch on drawn"),
])
def test_settings_of_a_block_that_cannot_be_are_refused_in_one_sentence(block: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        StudyConfig.from_dict(values(FIRST, block))
    assert "\n" not in str(caught.value)


def test_settings_of_a_block_reach_its_task_alone(tmp_path: Path) -> None:
    config = StudyConfig.from_dict(values({**FIRST, "finetune": {"classify": {"epochs": 9}}}, {"arms": ["uniform"], "tasks": ["classify"]}))
    found = {name: task_config(Cell("drawn", name, 0, ("classify",)), config, tmp_path, tmp_path / "run", "classify", "cpu", None).epochs for name in ("scratch", "uniform")}
    assert found == {"scratch": 9, "uniform": 2}
