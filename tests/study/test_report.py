"""The report of a study with invented results: what is pooled, what is refused, what every table must say."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # import-mode importlib does not; made_up.py is shared
from made_up import ARMS, data_set, study

from mwm.cli import main
from mwm.study.analysis import DESCRIPTIVE, EXPLORATORY, PRIMARY, Plan, differences, figures
from mwm.study.collect import COLUMNS, collect
from mwm.study.config import StudyConfig
from mwm.study.errors import StudyError
from mwm.study.region_facts import region_facts
from mwm.study.report import report, unfinished
from mwm.study.statistics import holm


def _config(**analysis) -> StudyConfig:
    return StudyConfig.from_dict({"data": {"toy": {"index": "toy", "prompt": "cyst"}}, "analysis": {"primary_endpoints": {"toy": "segment/dice"}, **analysis},
                                  "blocks": [{"data": "toy", "arms": [*ARMS, "roi"], "tasks": ["classify", "segment"]}]})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    study(folder / "out", data_set(folder / "toy"), name="toy")
    return folder / "out"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_patient_is_pooled_once_per_arm(finished: Path) -> None:
    found = collect(finished)
    assert set(found.arms("toy")) == set(ARMS) and found.arms("toy")[0] == "uniform"
    for arm in ARMS:
        answers = found.answers[("toy", arm, "classify", "")]
        assert len(answers.file) == 64 and len(answers.patients) == 16 and set(answers.fold) == set(range(5))
    dice = found.answers[("toy", "region", "segment", "dice")]
    by_fold = [np.mean([float(row["dice"]) for row in _rows(finished / f"cells/toy/region/{k}/segment/predictions.csv") if row["split"] == "test"]) for k in range(5)]
    np.testing.assert_allclose([dice.scores[dice.fold == k].mean() for k in range(5)], by_fold)
    row = next(row for row in found.rows if row["arm"] == "region" and row["task"] == "segment")
    assert tuple(row) == COLUMNS and row["hidden_share"] == 0.6 and row["encoder_gflop"] > 0 and row["task_seconds"] == 30.0


def test_the_primary_contrast_is_left_alone_and_the_others_are_corrected(finished: Path) -> None:
    rows = differences(collect(finished), Plan.from_dict(_config().analysis), rounds=300)
    primary = [row for row in rows if row.kind == PRIMARY]
    assert [(row.first, row.second, row.task, row.endpoint) for row in primary] == [("region", "shuffled", "segment", "dice")] and rows[0] is primary[0]
    assert np.isnan(primary[0].p_holm) and primary[0].verdict == "region higher" and primary[0].figure.patients == 16
    others = [row for row in rows if row.kind == EXPLORATORY]
    assert len(rows) == len(others) + 1 and len(others) > 10
    np.testing.assert_allclose([row.p_holm for row in others], holm([row.figure.p for row in others]))
    assert all(row.verdict in ("not decided", "not decided after correction", "equivalent in practice") for row in others if row.p_holm >= 0.05)


def test_the_probe_beside_a_primary_fine_tuning_is_not_marked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    study(out, data_set(tmp_path / "toy"), name="toy", tasks=("classify", "probe"))
    report(_config(primary_endpoints={"toy": "classify/auroc"}), out, rounds=100)
    tables = (out / "report" / "tables.md").read_text().split("\n### ")
    headers = {name: next(table for table in tables if table.startswith(f"toy: classification, {name}")).splitlines()[2] for name in ("fine-tuned", "linear probe")}
    assert "AUROC (primary)" in headers["fine-tuned"] and "(primary)" not in headers["linear probe"]


def test_names_that_a_spreadsheet_would_compute_are_reported_like_others(tmp_path: Path) -> None:
    out = tmp_path / "out"
    study(out, data_set(tmp_path / "toy", classes=("=cyst", "scar")), name="toy")
    report(_config(), out, rounds=100)
    answers = _rows(out / "shortcut/toy.csv")
    assert {row["label"] for row in answers} == {"'=cyst", "scar"} and "./=cyst_0_0.png" in {row["file"] for row in answers}
    assert "=cyst_0_0.png" in collect(out).answers[("toy", "region", "classify", "")].file


def test_the_report_says_what_each_row_rests_on(out: Path) -> None:
    (out / "cells/toy/uniform60/3/cell.json").unlink()  # killed before its last task
    facts = out / "cells/toy/shuffled/2/cell.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"status": "failed", "error": "loss is not finite"}))
    for fold, overlap in ((0, 0.1), (1, 0.3)):
        path = out / f"regions/toy/{fold}/shuffled-crossfit/regions.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"meta": {"source": {"kind": "shuffled", "overlap": overlap}}}))
    folder = report(_config(), out, rounds=200)
    text = (folder / "tables.md").read_text()
    assert "`toy/shuffled/2` failed: loss is not finite" in text and "`toy/uniform60`: fold 3 not run" in text and "`toy/roi`: folds 0, 1" in text
    assert "Dice (primary)" in text and "shortcut: size, brightness, border" in text and "64 / 16 / 5" in text and "**primary**" in text
    shown = [line.split(" | ") for line in text.splitlines() if line.startswith(("| `region` |", "| `shuffled` |", "| `uniform` |")) and line.endswith(" / 5 |")]
    assert len(shown) == 4 and all("supervised region source" in cells[1] for cells in shown)
    assert "| `shuffled-crossfit` | shuffled | 2 |  |  |  | 0.200 |" in text and len(_rows(folder / "regions.csv")) == 2
    names = {row["arm"] for row in _rows(folder / "arms.csv")}
    assert names == {*ARMS, "shortcut"}
    shuffled = next(row for row in _rows(folder / "contrasts.csv") if (row["first"], row["second"], row["kind"]) == ("region", "shuffled", "primary"))
    assert shuffled["folds"] == "4"
    assert {path.name for path in folder.glob("*.png")} == {"contrasts-toy.png", "hidden-toy-segment-dice.png", "hidden-toy-classify-auroc.png"}


def test_a_task_that_failed_later_takes_its_own_results_alone(out: Path) -> None:
    cell = out / "cells/toy/shuffled/2"
    shutil.rmtree(cell / "classify")
    facts = json.loads((cell / "cell.json").read_text())
    (cell / "cell.json").write_text(json.dumps(facts | {"status": "failed", "error": "loss is not finite", "tasks": ["segment"]}))
    found = collect(out)
    assert len(found.answers[("toy", "shuffled", "segment", "dice")].file) == 64 and set(found.answers[("toy", "shuffled", "classify", "")].fold) == {0, 1, 3, 4}
    text = (report(_config(), out, rounds=50) / "tables.md").read_text()
    assert "`toy/shuffled/2` failed: loss is not finite (results before that count: segment)" in text
    (cell / "cell.json").write_text(json.dumps(facts | {"status": "failed", "error": "loss is not finite"}))  # as it was written before tasks were counted one by one
    assert set(collect(out).answers[("toy", "shuffled", "segment", "dice")].fold) == {0, 1, 3, 4}


def test_shared_files_name_no_image_and_no_patient(out: Path) -> None:
    folder = report(_config(), out, rounds=50)
    shared = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".md", ".csv"))
    assert "secret" not in shared and ".png" not in shared
    assert "cyst_0_0.png" in (folder / "local/toy.region.classify.csv").read_text()


def test_too_few_folds_are_described_only(out: Path) -> None:
    for fold in (1, 3):
        shutil.rmtree(out / f"cells/toy/shuffled/{fold}")
    rows = differences(collect(out), Plan.from_dict(_config().analysis), rounds=50)
    mine = [row for row in rows if row.second == "shuffled"]
    assert mine and all(row.kind == DESCRIPTIVE and np.isnan(row.figure.p) and row.verdict == "described only" and row.figure.folds == 3 for row in mine)


def test_data_sets_of_few_patients_get_no_intervals(tmp_path: Path) -> None:
    study(tmp_path / "out", data_set(tmp_path / "toy", patients=3), folds="fit", tasks=("classify",))
    found = collect(tmp_path / "out")
    assert all(row.kind == DESCRIPTIVE for row in figures(found, Plan(), rounds=20))
    text = (report(_config(), tmp_path / "out", rounds=50) / "tables.md").read_text()
    assert "Descriptive only" in text and "described only" in text
    table = text.split("## toy")[1].split("### toy: what it cost")[0]
    assert "primary" not in table and not [line for line in table.splitlines() if line.startswith("| `region` |") and "(" in line.split("|")[3]]


def test_predictions_of_images_that_the_fold_may_have_seen_are_refused(out: Path) -> None:
    path = out / "cells/toy/region/0/classify/predictions.csv"
    other = _rows(out / "cells/toy/region/1/classify/predictions.csv")[-1]["file"]
    path.write_text(path.read_text() + f"{other},test,cyst,cyst,0.9,0.1\n")
    with pytest.raises(StudyError, match="must be of the images that fold 0 tests"):
        collect(out)


def test_cells_of_other_settings_or_classes_are_refused(out: Path) -> None:
    path = out / "cells/toy/region/1/classify/predictions.csv"
    before = path.read_text()
    path.write_text(before.replace("p_scar", "p_scars"))
    with pytest.raises(StudyError, match="must have the classes cyst, scar"):
        collect(out)
    path.write_text(before)
    facts = out / "cells/toy/region/1/cell.json"
    facts.write_text(facts.read_text().replace("hash-region", "other"))
    with pytest.raises(StudyError, match="must have the same settings, got 2 kinds for toy/region"):
        collect(out)


def test_empty_studies_and_broken_files_are_named(out: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="got none that is finished"):
        collect(tmp_path / "empty")
    (out / "cells/toy/region/1/classify/metrics.json").write_text("{")
    with pytest.raises(StudyError, match="must be JSON"):
        collect(out)


@pytest.mark.parametrize(("analysis", "words"), [({"primery": 1}, "must have the settings"), ({"contrasts": [["region"]]}, "pairs of arms"),
                                                 ({"primary_endpoints": {"toy": "dice"}}, "TASK/ENDPOINT")])
def test_a_wrong_plan_is_refused(analysis: dict, words: str) -> None:
    with pytest.raises(StudyError, match=words):
        Plan.from_dict(analysis)


def test_arms_of_a_data_set_that_was_not_reached_are_listed_though_its_folds_are_not_known(finished: Path) -> None:
    config = StudyConfig.from_dict({"data": {"toy": {"index": "toy", "prompt": "cyst"}, "later": {"index": "x", "prompt": "y", "folds": "fit"}},
                                    "blocks": [{"data": "toy", "arms": ["region"], "tasks": ["classify"]}, {"data": "later", "arms": ["scratch"], "tasks": ["probe"]}]})
    assert unfinished(config, collect(finished)) == ["later/scratch"]


def test_arms_of_a_fold_that_saw_other_regions_are_named(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for name, digest in (("uniform", "a"), ("region", "a"), ("shuffled", "c")):
        with (out / "cells" / "toy" / name / "0" / "run" / "config.yaml").open("a") as file:
            file.write(f"resolved: {{regions: {digest}}}\n")
    words = "Fold 0: the arms did not see the same regions (region / uniform)"
    assert words not in report(_config(), out, rounds=50).joinpath("tables.md").read_text()
    path = out / "cells" / "toy" / "uniform" / "0" / "run" / "config.yaml"
    path.write_text(path.read_text().replace("regions: a", "regions: b"))
    assert words in report(_config(), out, rounds=50).joinpath("tables.md").read_text()


def test_empty_regions_are_a_share_of_the_regions(tmp_path: Path) -> None:
    folder = tmp_path / "regions" / "toy" / "0" / "crossfit"
    folder.mkdir(parents=True)
    (folder / "regions.json").write_text(json.dumps({"meta": {"source": {"kind": "supervised region source", "dice": 0.5, "empty": 5, "regions": 20, "images": 18}}}))
    assert region_facts(tmp_path)[0]["empty"] == 0.25


def test_a_failure_stays_listed_when_a_later_call_came_to_an_end(out: Path) -> None:
    cell = out / "cells" / "toy" / "region" / "1" / "cell.json"
    cell.write_text(json.dumps({**json.loads(cell.read_text()), "failed_before": ["loss is not finite"]}))
    text = (report(_config(), out, rounds=20) / "tables.md").read_text()
    assert "loss is not finite (in an earlier call; a later one came to an end)" in text
    assert collect(out).answers["toy", "region", "classify", ""].fold.max() == 4  # and its results count


def test_a_report_by_another_plan_is_refused(out: Path, tmp_path: Path) -> None:
    import yaml

    (out / "study.yaml").write_text(yaml.safe_dump(_config().to_dict()))
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(_config(primary=["region", "uniform"]).to_dict()))
    assert main(["study", str(other), "--report", "--out", str(out)]) == 2 and not (out / "report").exists()
    assert main(["study", "--report", "--out", str(out)]) == 0 and (out / "report").exists()
