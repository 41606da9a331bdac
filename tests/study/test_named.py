"""What comes to a study after results are there is marked, on whatever way it comes; what was named in time is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tests.transfer.drawn import rows_with_patients, write_index

from mwm.cli import main
from mwm.study.config import StudyConfig
from mwm.study.named import STORED, late, merge_named, named, record_named


def values(*blocks: tuple[list[str], list[str]]) -> dict:
    return {"data": {"drawn": {"index": "drawn/index.csv", "prompt": "body", "folds": 3}, "other": {"index": "other/index.csv", "prompt": "body", "folds": 3}},
            "blocks": [{"data": "drawn", "arms": arms, "tasks": tasks} for arms, tasks in blocks],
            "pretrain": {"encoder": "resnet10t", "image_size": 64, "channels": 1}, "finetune": {"probe": {"bootstrap": 20}, "classify": {"epochs": 1, "bootstrap": 20}}}


def config(*blocks: tuple[list[str], list[str]]) -> StudyConfig:
    return StudyConfig.from_dict(values(*blocks))


def result(out: Path, data: str, arm: str, fold: int, task: str) -> None:
    folder = out / "cells" / data / arm / str(fold) / task
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")


def test_arms_and_tasks_count_from_when_they_were_named(tmp_path: Path) -> None:
    record_named(config((["uniform", "region"], ["segment"])), tmp_path)
    result(tmp_path, "drawn", "uniform", 0, "segment")
    result(tmp_path, "other", "uniform", 0, "segment")
    record_named(config((["uniform", "region"], ["segment"])), tmp_path)
    assert late(tmp_path) == {}
    result(tmp_path, "drawn", "uniform", 1, "segment")
    record_named(config((["roi"], ["segment"]), (["uniform"], ["segment", "probe"])), tmp_path)  # region is left out, and keeps what is known of it
    assert late(tmp_path) == {("drawn", "roi", "segment"): 2, ("drawn", "uniform", "probe"): 2}
    result(tmp_path, "drawn", "roi", 0, "segment")
    record_named(config((["region", "roi", "uniform"], ["segment", "probe"])), tmp_path)
    assert late(tmp_path) == {("drawn", "roi", "segment"): 2, ("drawn", "uniform", "probe"): 2, ("drawn", "region", "probe"): 3, ("drawn", "roi", "probe"): 3}


def test_a_study_of_before_counts_as_named_in_time(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values((["uniform"], ["segment"]))))
    result(tmp_path, "drawn", "uniform", 0, "segment")
    record_named(config((["uniform", "region"], ["segment"])), tmp_path)
    assert late(tmp_path) == {("drawn", "region", "segment"): 1}


def test_cells_of_an_archive_count_as_if_they_had_been_run_here(tmp_path: Path) -> None:
    packed, out = tmp_path / "packed", tmp_path / "out"
    packed.mkdir(), out.mkdir()
    record_named(config((["uniform"], ["segment"])), packed)
    result(packed, "drawn", "uniform", 0, "segment")
    record_named(config((["uniform", "roi"], ["segment"])), packed)
    record_named(config((["uniform", "roi", "edges"], ["segment"])), out)  # an empty study that is to take the archive's cells
    assert late(out) == {}
    merge_named(packed, out)
    assert late(out) == {("drawn", "roi", "segment"): 1, ("drawn", "edges", "segment"): 1}
    merge_named(packed, out)
    assert late(out) == {("drawn", "roi", "segment"): 1, ("drawn", "edges", "segment"): 1}


@pytest.mark.parametrize("content", ['{"drawn/uniform": 1}', '{"drawn/uniform/segment": -1}', '{"drawn/uniform/segment": "1"}', '{"drawn/uniform/segment": true}'])
def test_a_file_of_another_form_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / STORED).write_text(content)
    with pytest.raises(ValueError, match=r"must hold a whole number by DATA/ARM/TASK"):
        named(tmp_path)


def test_the_tables_say_what_was_named_late(tmp_path: Path) -> None:
    for name in ("drawn", "other"):
        write_index(tmp_path / name, rows_with_patients(18, 2))
    file = tmp_path / "study.yaml"

    def run(blocks: list[tuple[list[str], list[str]]], out: str, *more: str) -> str:
        file.write_text(yaml.safe_dump(values(*blocks)))
        assert main(["study", str(file), "--root", str(tmp_path), "--out", str(tmp_path / out), "--device", "cpu", "--workers", "1", "--threads", "1", *more]) == 0
        report = tmp_path / out / "report" / "tables.md"
        return report.read_text() if report.is_file() else ""

    assert "Named after" not in run([(["scratch"], ["probe"])], "first")
    assert json.loads((tmp_path / "first" / STORED).read_text()) == {"drawn/scratch/probe": 0}
    words = run([(["scratch"], ["probe", "classify"])], "first")
    assert ("## Named after results were there\n\n* `drawn/scratch`, classification, fine-tuned: came to the configuration when 3 results (cells times tasks) of drawn "
            "were there") in words
    assert main(["study", "--pack", str(tmp_path / "cells.zip"), "--out", str(tmp_path / "first")]) == 0
    blocks = [(["scratch"], ["probe", "classify"])]
    run(blocks, "second", "--unpack", str(tmp_path / "cells.zip"))
    assert run(blocks, "second").split("## Named")[1] == words.split("## Named")[1]
    run(blocks, "third", "--dry-run", "--only", "scratch/0")
    assert not (tmp_path / "third" / STORED).exists()
