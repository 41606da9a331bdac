"""Tasks of a cell that come in different blocks, are added later, or fail; detection as a task; the file of weights."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.transfer.drawn import rows_with_patients, write_index
from tests.transfer.drawn_objects import box_of, picture

import mwm.study.cells
from mwm.study.cell_files import Cell, exported, fingerprint, finished, pretrains_again, read_facts, weights_hash, write_failure
from mwm.study.cells import run_cell
from mwm.study.command import StudyOptions, study
from mwm.study.config import StudyConfig
from mwm.study.errors import StudyError
from mwm.study.folds import write_folds
from mwm.study.report import report, unfinished
from mwm.study.runner import jobs_of

SMALL = {"encoder": "resnet10t", "image_size": 64, "channels": 1, "epochs": 1, "batch_size": 16, "decoder_width": 32, "cache": "device", "workers": 0}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small lose time on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def values(*blocks: tuple[list[str], list[str]], **more: Any) -> dict[str, Any]:
    """A study of one drawn data set; blocks as (arms, tasks)."""
    return {"data": {"drawn": {"index": "drawn/index.csv", "prompt": "body", "folds": 3}}, "pretrain": SMALL, "source": {"name": "threshold"}, "keep": "results",
            "blocks": [{"data": "drawn", "arms": arms, "tasks": tasks} for arms, tasks in blocks], "finetune": {"probe": {"bootstrap": 20}}, **more}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small data set."""
    folder = tmp_path_factory.mktemp("data")
    write_index(folder / "drawn", rows_with_patients(18, 2))
    return folder


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Fine-tuning that writes a result and trains nothing; tasks named in the set fail."""
    fails: set[str] = set()

    def finetune(settings: Any) -> None:
        if Path(settings.out).name in fails:
            raise ValueError("loss is not finite")
        Path(settings.out).mkdir(parents=True)
        (Path(settings.out) / "metrics.json").write_text("{}")

    monkeypatch.setattr(mwm.study.cells, "finetune", finetune)
    return fails


def drawn_objects(folder: Path, patients: int = 12) -> None:
    """Two images per patient with one object each; the patient's class is that of its objects."""
    rows, seed = [], 0
    for p in range(patients):
        for k in range(2):
            while (found := picture(seed))[1][0][0] != ("disc", "square")[p % 2]:
                seed += 1
            seed += 1
            label, mask = found[1][0]
            for part in ("images", "masks"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            name = f"p{p:02d}_{k}.png"
            Image.fromarray(found[0]).save(folder / "images" / name)
            Image.fromarray(mask.astype("uint8") * 255).save(folder / "masks" / name)
            rows.append({"file": f"images/{name}", "label": label, "patient": f"p{p:02d}", "mask": f"masks/{name}",
                         "boxes": json.dumps([{"label": label, "bbox_xyxy": box_of(mask)}])})
    with (folder / "index.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_detection_of_a_later_block_takes_the_encoder_that_is_there_and_reaches_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocotools")
    drawn_objects(tmp_path / "data" / "drawn")
    tasks = {"probe": {"bootstrap": 20}, "detect": {"epochs": 1, "batch_size": 8, "detect_width": 16, "bootstrap": 20}}
    config = StudyConfig.from_dict(values((["region", "scratch"], ["probe"]), (["region", "scratch"], ["detect"]), finetune=tasks, pretrain=SMALL | {"encoder": "resnet18"}))
    out = tmp_path / "out"
    write_folds(tmp_path / "data" / "drawn", out, name="drawn", folds=3)
    for arm in ("region", "scratch"):
        run_cell(Cell("drawn", arm, 0, ("probe",)), config, out, "cpu")
    run = out / "cells" / "drawn" / "region" / "0" / "run"
    assert exported(run)  # keep is results, but detection is still to come
    text = (report(config, out, rounds=20) / "tables.md").read_text()
    assert "`drawn/region (detect)`: fold 0 not run" in text and "`drawn/region`: folds 1, 2 not run" in text
    monkeypatch.setattr(mwm.study.cells, "pretrain", lambda settings: pytest.fail("pre-trained again"))
    for arm in ("region", "scratch"):
        run_cell(Cell("drawn", arm, 0, ("detect",)), config, out, "cpu")
    assert not exported(run)
    facts = read_facts(run.parent)
    assert facts["status"] == "done" and set(facts["wall_seconds"]) == {"pretrain", "probe", "detect"} and not (run.parent / "progress.json").exists()
    folder = report(config, out, rounds=20)
    text = (folder / "tables.md").read_text()
    assert "### drawn: detection" in text and "box AP" in text and "mask AP" in text and "(detect)" not in text
    with (folder / "contrasts.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["task"] == "detect"]
    assert {row["endpoint"] for row in rows} == {"box_ap", "mask_ap"} and all((row["images"], row["patients"]) == ("8", "4") for row in rows)


def test_a_budget_is_spent_block_by_block() -> None:
    config = StudyConfig.from_dict(values((["region", "scratch"], ["probe"]), (["scratch"], ["classify"]), (["region"], ["probe", "segment"])))
    assert list(config.pieces()) == [("drawn", "region", ("probe",)), ("drawn", "scratch", ("probe",)), ("drawn", "scratch", ("classify",)), ("drawn", "region", ("segment",))]
    jobs = jobs_of([Cell(data, name, 0, tasks) for data, name, tasks in config.pieces()], config)
    assert [job.name for job in jobs] == ["regions drawn/0", "drawn/region/0", "drawn/scratch/0", "drawn/scratch/0:classify", "drawn/region/0:segment"]
    assert jobs[3].after == {"drawn/scratch/0"} and jobs[4].after == {"regions drawn/0", "drawn/region/0"}


def test_a_task_added_after_the_encoder_has_gone_says_so_and_pretrains_again(root: Path, tmp_path: Path, stub: set[str], capsys: pytest.CaptureFixture[str],
                                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    out, first, then = tmp_path / "out", StudyConfig.from_dict(values((["region"], ["probe"]))), StudyConfig.from_dict(values((["region"], ["probe"]), (["region"], ["classify"])))
    write_folds(root / "drawn", out, name="drawn", folds=3)
    run_cell(Cell("drawn", "region", 0, ("probe",)), first, out, "cpu")
    run, added = out / "cells" / "drawn" / "region" / "0" / "run", Cell("drawn", "region", 0, ("classify",))
    assert not exported(run) and not list(run.glob("*.safetensors"))
    assert pretrains_again(added, out, then) == read_facts(run.parent)["wall_seconds"]["pretrain"] > 0
    assert pretrains_again(Cell("drawn", "region", 1, ("classify",)), out, then) is None  # has nothing yet: its first pre-training is no repetition
    monkeypatch.setattr("mwm.study.command.run_jobs", lambda jobs, *a, **k: mwm.study.runner.Outcome())
    monkeypatch.setattr("mwm.study.command.write_report", lambda config, out, **_: out)
    study(then, StudyOptions(str(out), str(root), device="cpu", only="region/0"))
    said = capsys.readouterr().out
    assert "1 cells were finished without keeping their encoder (keep: results) and pre-train again for classify: drawn/region/0; the first time that took" in said
    steps = (run / "metrics.csv").read_text().count("\n")
    run_cell(added, then, out, "cpu")
    facts = read_facts(run.parent)
    assert facts["status"] == "done" and {"probe", "classify"} <= set(facts["wall_seconds"]) and (run / "metrics.csv").read_text().count("\n") == steps
    assert pretrains_again(added, out, then) is None


def test_a_kept_encoder_is_not_made_again(root: Path, tmp_path: Path, stub: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out, config = tmp_path / "out", StudyConfig.from_dict(values((["region"], ["probe"]), keep="encoder"))
    write_folds(root / "drawn", out, name="drawn", folds=3)
    run_cell(Cell("drawn", "region", 0, ("probe",)), config, out, "cpu")
    added, then = Cell("drawn", "region", 0, ("classify",)), StudyConfig.from_dict(values((["region"], ["probe", "classify"]), keep="encoder"))
    assert pretrains_again(added, out, then) is None
    monkeypatch.setattr(mwm.study.cells, "pretrain", lambda settings: pytest.fail("pre-trained again"))
    run_cell(added, then, out, "cpu")
    assert finished(added, out, then)


def test_a_task_that_fails_does_not_undo_those_before(root: Path, tmp_path: Path, stub: set[str]) -> None:
    config, out = StudyConfig.from_dict(values((["scratch"], ["probe", "classify"]))), tmp_path / "out"
    write_folds(root / "drawn", out, name="drawn", folds=3)
    cell, probe, classify = (Cell("drawn", "scratch", 0, tasks) for tasks in (("probe", "classify"), ("probe",), ("classify",)))
    stub.add("classify")
    with pytest.raises(ValueError, match="not finite"):
        run_cell(cell, config, out, "cpu")
    assert not (cell.folder(out) / "cell.json").exists()
    write_failure(cell, config, out, "loss is not finite")
    facts = read_facts(cell.folder(out))
    assert (facts["status"], facts["tasks"], facts["regions"]) == ("failed", ["probe"], "no regions") and "probe" in facts["wall_seconds"]
    assert finished(probe, out, config) and not finished(classify, out, config) and not finished(cell, out, config)
    stub.clear()
    run_cell(cell, config, out, "cpu")
    assert finished(cell, out, config) and read_facts(cell.folder(out))["error"] is None


def test_a_done_cell_whose_added_task_fails_keeps_what_it_says_about_itself(root: Path, tmp_path: Path, stub: set[str]) -> None:
    config, out = StudyConfig.from_dict(values((["scratch"], ["probe", "classify"]))), tmp_path / "out"
    write_folds(root / "drawn", out, name="drawn", folds=3)
    run_cell(Cell("drawn", "scratch", 0, ("probe",)), config, out, "cpu")
    stub.add("classify")
    added = Cell("drawn", "scratch", 0, ("classify",))
    with pytest.raises(ValueError, match="not finite"):
        run_cell(added, config, out, "cpu")
    assert read_facts(added.folder(out))["status"] == "done"  # while it is tried again, what is there counts
    write_failure(added, config, out, "loss is not finite")
    facts = read_facts(added.folder(out))
    assert facts["status"] == "failed" and facts["tasks"] == ["probe"] and facts["says"] == "no pre-training"


def test_other_imagenet_weights_are_refused_and_touch_no_other_arm(root: Path, tmp_path: Path, stub: set[str]) -> None:
    config, out, weights = StudyConfig.from_dict(values((["imagenet", "scratch"], ["probe"]))), tmp_path / "out", tmp_path / "weights.safetensors"
    write_folds(root / "drawn", out, name="drawn", folds=3)
    weights.write_bytes(b"one")
    cell, scratch = (Cell("drawn", arm, 0, ("probe",)) for arm in ("imagenet", "scratch"))
    for one in (cell, scratch):
        run_cell(one, config, out, "cpu", str(weights))
    assert read_facts(cell.folder(out))["weights_hash"] == weights_hash(weights) and "weights_hash" not in read_facts(scratch.folder(out))
    assert fingerprint(scratch, config, str(weights)) == config.fingerprint("drawn", "scratch")
    before = fingerprint(cell, config, str(weights))
    weights.write_bytes(b"two!")
    assert fingerprint(cell, config, str(weights)) != before and finished(scratch, out, config, str(weights)) and not finished(cell, out, config, str(weights))
    with pytest.raises(StudyError, match=r"^study: --weights must be the file that drawn/imagenet/0 was run with, got another content") as caught:
        study(config, StudyOptions(str(out), str(root), device="cpu", weights=str(weights)))
    assert "\n" not in str(caught.value)
    with pytest.raises(StudyError, match=r"^study: --weights must be a file of weights, got .*absent"):
        study(config, StudyOptions(str(out), str(root), device="cpu", weights=str(tmp_path / "absent")))


def test_cells_that_lack_only_some_tasks_are_listed_with_them(root: Path, tmp_path: Path) -> None:
    from mwm.study.collect import Collected, FoldPatients

    found = Collected(rows=[{"status": "done", "data_set": "drawn", "arm": "scratch", "fold": 0, "task": "probe"}], folds={"drawn": FoldPatients({0: {}, 1: {}}, {})})
    assert unfinished(StudyConfig.from_dict(values((["scratch"], ["probe", "classify"]))), found) == ["drawn/scratch (classify)/0", "drawn/scratch/1"]
