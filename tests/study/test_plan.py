"""The plan of a study: fixed before the first result, and no question asked twice."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # import-mode importlib does not; made_up.py is shared
import made_up

from mwm.study.analysis import EXPLORATORY, Plan, differences
from mwm.study.collect import collect
from mwm.study.command import StudyOptions, study
from mwm.study.config import StudyConfig
from mwm.study.errors import StudyError

ARMS = ["uniform", "region", "shuffled"]


def config(**analysis: Any) -> StudyConfig:
    """A study of the made-up data set."""
    return StudyConfig.from_dict({"data": {"toy": {"index": "toy", "prompt": "body"}}, "analysis": {"primary_endpoints": {"toy": "segment/dice"}, **analysis},
                                  "source": {"name": "threshold"}, "blocks": [{"data": "toy", "arms": ARMS, "tasks": ["classify", "segment"]}]})


@pytest.mark.parametrize("later", [{"primary": ["region", "uniform"]}, {"primary_endpoints": {"toy": "classify/auroc"}}, {"effects": {"dice": 0.2}}, {"descriptive": ["toy"]}])
def test_what_is_primary_may_not_change_after_a_result(tmp_path: Path, later: dict[str, Any]) -> None:
    index = made_up.data_set(tmp_path / "data" / "toy")
    options = StudyOptions(str(tmp_path / "out"), str(tmp_path / "data"), device="cpu", budget=0.0)
    study(config(), options)
    study(config(**later), options)  # nobody has seen a number yet
    study(config(), options)
    made_up.study(tmp_path / "out", index)
    said = (tmp_path / "out" / "study.yaml").read_text()
    with pytest.raises(StudyError, match=r"must stay as they were before the first result, got others for toy\."):
        study(config(**later), options)
    assert (tmp_path / "out" / "study.yaml").read_text() == said


def test_contrasts_may_be_added_after_a_result(tmp_path: Path) -> None:
    index = made_up.data_set(tmp_path / "data" / "toy")
    options = StudyOptions(str(tmp_path / "out"), str(tmp_path / "data"), device="cpu", budget=0.0)
    study(config(), options)
    made_up.study(tmp_path / "out", index)
    study(config(contrasts=[["region", "uniform"], ["shuffled", "uniform"]]), options)


def test_a_pair_is_asked_in_one_direction(tmp_path: Path) -> None:
    made_up.study(tmp_path / "out", made_up.data_set(tmp_path / "data" / "toy"))
    plan = Plan.from_dict({"primary": ["uniform", "region"], "primary_endpoints": {"toy": "segment/dice"}})  # the contrasts have region - uniform
    rows = differences(collect(tmp_path / "out"), plan, rounds=50)
    pair = [row for row in rows if {row.first, row.second} == {"uniform", "region"}]
    assert sorted((row.task, row.endpoint) for row in pair) == [("classify", "accuracy"), ("classify", "auroc"), ("segment", "dice")]
    assert all(row.first == "uniform" for row in pair) and any(row.kind == EXPLORATORY for row in rows)
