"""The archive of a study: it names nobody, the same tables come out of it, and a study goes on from it."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))  # import-mode importlib does not; made_up.py is shared
from made_up import ARMS, data_set, study
from tests.transfer.drawn import rows_with_patients, write_index

from mwm.cli import main
from mwm.study.archive import pack, unpack
from mwm.study.collect import collect
from mwm.study.errors import StudyError
from mwm.study.mask_facts import mask_facts
from mwm.study.region_facts import region_facts

pytest.importorskip("pycocotools", reason="pycocotools is not installed")

TABLES = ("results.csv", "arms.csv", "contrasts.csv", "regions.csv", "masks.csv", "tables.md")
SETTINGS = {"data": {"toy": {"index": "toy/index.csv", "prompt": "cyst"}}, "analysis": {"primary_endpoints": {"toy": "segment/dice"}},
            "blocks": [{"data": "toy", "arms": [*ARMS, "roi"], "tasks": ["classify", "segment"]}]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set and a study of it, one of whose cells failed."""
    folder = tmp_path_factory.mktemp("study")
    study(folder / "out", data_set(folder / "toy"), name="toy", arms={name: ARMS[name] for name in ("uniform", "region", "scratch")})
    (folder / "study.yaml").write_text(yaml.safe_dump(SETTINGS))
    (folder / "out" / "study.yaml").write_text(yaml.safe_dump({**SETTINGS, "data": {"toy": {**SETTINGS["data"]["toy"], "index": str(folder / "toy" / "index.csv")}}}))
    _detections(folder / "out")
    failed = folder / "out" / "cells" / "toy" / "roi" / "0"
    failed.mkdir(parents=True)
    (failed / "cell.json").write_text(json.dumps({"status": "failed", "error": f"{folder}/toy/cyst_0_1.png is damaged", "fold": 0, "tasks": []}))
    regions = folder / "out" / "regions" / "toy" / "2" / "crossfit"
    regions.mkdir(parents=True)
    (regions / "regions.json").write_text(json.dumps({"meta": {"source": {"kind": "supervised region source", "dice": 0.5, "missed": 0.25, "empty": 2, "regions": 8, "images": 8}},
                                                      "regions": {"cyst_0_1.png": {}}}))
    drawn = folder / "out" / "mask_facts" / "toy" / "2" / "region.json"
    drawn.parent.mkdir(parents=True)
    drawn.write_text(json.dumps({"data_set": "toy", "arm": "region", "fold": 2, "hidden": 0.5, "hidden_inside": 0.75, "patches_inside": 1.5, "patches": 4, "images": 8}))
    return folder


def _detections(out: Path) -> None:
    """A task `detect` in every cell of one arm, with keys beside those that COCO names."""
    for cell in sorted((out / "cells" / "toy" / "region").iterdir()):
        files = [row["file"] for row in _tested(cell / "classify" / "predictions.csv")]
        truth = {"images": [{"id": k, "file_name": file, "width": 12, "height": 12, "path": str(out / file)} for k, file in enumerate(files)], "info": str(out),
                 "annotations": [{"id": k, "image_id": k, "category_id": 1, "bbox": [2, 2, 6, 6], "area": 36, "iscrowd": 0, "from": file} for k, file in enumerate(files)],
                 "categories": [{"id": 1, "name": "cyst"}]}
        results = [{"image_id": k, "category_id": 1, "bbox": [2, 2 + k % 3, 6, 6], "score": 0.5, "file": file} for k, file in enumerate(files)]
        (cell / "detect").mkdir()
        metrics = {"task": "detect", "test": {"box_ap": {"value": 0.5}, "images": len(files)}}
        for name, content in {"ground_truth.json": truth, "predictions.json": results, "metrics.json": metrics}.items():
            (cell / "detect" / name).write_text(json.dumps(content))


@pytest.fixture(scope="module")
def archive(finished: Path) -> Path:
    assert pack(finished / "out", finished / "cells.zip") == 16
    return finished / "cells.zip"


def _members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as held:
        return {name: held.read(name) for name in held.namelist()}


def _write(path: Path, members: dict[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w") as held:
        for name, content in members.items():
            held.writestr(name, content)
    return path


def _tested(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["split"] == "test"]


def test_the_archive_names_no_image_patient_or_folder(finished: Path, archive: Path) -> None:
    members = _members(archive)
    assert any(name.endswith("predictions.csv") for name in members) and "cells/toy/roi/0/cell.json" in members
    for name, content in members.items():
        text = name + content.decode()
        for told in ("secret", ".png", "cyst_0", "scar_0", str(finished), finished.name, "damaged"):
            assert told not in text, (name, told)
    answers = members["cells/toy/uniform/0/classify/predictions.csv"].decode().splitlines()
    assert len(answers) == 1 + len(_tested(finished / "out/cells/toy/uniform/0/classify/predictions.csv")) and "val" not in {line.split(",")[1] for line in answers}


def test_the_same_tables_come_out_of_it(finished: Path, archive: Path, tmp_path: Path) -> None:
    assert main(["study", "--unpack", str(archive), "--out", str(tmp_path / "there")]) == 0
    for folder in (finished / "out", tmp_path / "there"):
        assert main(["study", "--report", "--out", str(folder)]) == 0
    for name in TABLES:
        here, there = ((folder / "report" / name).read_text() for folder in (finished / "out", tmp_path / "there"))
        assert here.replace(f"{finished}/toy/cyst_0_1.png is damaged", "the message stayed with the study") == there, name
    for facts in (region_facts, mask_facts):
        assert facts(tmp_path / "there") == facts(finished / "out") and len(facts(finished / "out")) == 1
    assert main(["study", "--pack", str(tmp_path / "again.zip"), "--out", str(tmp_path / "there")]) == 0
    assert (tmp_path / "again.zip").read_bytes() == archive.read_bytes()


def test_beside_the_data_images_get_their_names_back(finished: Path, archive: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "toy", tmp_path / "data" / "toy")
    words = ["study", str(finished / "study.yaml"), "--root", str(tmp_path / "data"), "--out", str(tmp_path / "there")]
    kept = tmp_path / "there" / "cells" / "toy" / "scratch" / "3"
    kept.mkdir(parents=True)
    (kept / "cell.json").write_text("{}")
    assert main([*words, "--unpack", str(archive)]) == 0
    assert (kept / "cell.json").read_text() == "{}" and not (kept / "classify").exists()
    for path in sorted((finished / "out" / "cells").glob("*/*/*/*/predictions.csv")):
        there = tmp_path / "there" / path.relative_to(finished / "out")
        assert there.exists() != (there.parent.parent == kept)
        if there.exists():
            assert _tested(there) == _tested(path)
    assert not list((tmp_path / "there").glob(".unpack-*"))
    shutil.rmtree(kept)
    assert main([*words, "--unpack", str(archive)]) == 0
    here, there = collect(finished / "out"), collect(tmp_path / "there")
    assert set(here.detections) == set(there.detections) == {("toy", "region")} and here.detections["toy", "region"].patients == there.detections["toy", "region"].patients
    assert set(here.answers) == set(there.answers) and all(here.answers[key].file == there.answers[key].file for key in here.answers)


def test_folds_of_other_data_are_refused(archive: Path, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_set(tmp_path / "data" / "toy", patients=9)
    assert main(["study", str(finished / "study.yaml"), "--root", str(tmp_path / "data"), "--out", str(tmp_path / "there"), "--unpack", str(archive)]) == 2
    assert "the folds of toy must be those that the archive was made with" in capsys.readouterr().err
    assert not (tmp_path / "there" / "cells").exists()


@pytest.mark.parametrize("name", ["../escape.json", "/etc/escape.json", "cells/toy/../../x/0/cell.json", "cells/toy/region/0/run/encoder.safetensors", "notes.txt",
                                  "cells/toy/.hidden/0/cell.json", "cells\\toy\\region\\0\\cell.json"])
def test_foreign_members_are_refused(archive: Path, tmp_path: Path, name: str) -> None:
    hostile = _write(tmp_path / "hostile.zip", {**_members(archive), name: "{}"})
    with pytest.raises(StudyError, match="must hold only what mwm study --pack writes"):
        unpack(hostile, tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == [] and not (tmp_path / "escape.json").exists()


@pytest.mark.parametrize(("name", "content"), [("cells/toy/region/0/cell.json", "[]"), ("cells/toy/region/0/cell.json", "{"),
                                               ("cells/toy/region/0/classify/metrics.json", '{"test": 3}'),
                                               ("cells/toy/region/0/classify/predictions.csv", "file,split,label,p_cyst,p_scar\n000001,test,mole,x,y\n"),
                                               ("cells/toy/region/0/classify/predictions.csv", "file,split,label\n../x.png,test,cyst\n"), ("folds/toy/0.csv", "\0"),
                                               ("study.yaml", "data: 3"), ("study.yaml", "!!python/object/apply:os.getcwd []"), ("folds/toy/folds.json", "[1]")])
def test_damaged_contents_are_refused_in_a_sentence(archive: Path, tmp_path: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = _write(tmp_path / "hostile.zip", {**_members(archive), name: content})
    assert main(["study", "--unpack", str(hostile), "--out", str(tmp_path / "there")]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and "unforeseen" not in said and said.strip()
    assert list((tmp_path / "there").iterdir()) == []


def test_what_is_no_archive_is_refused(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.zip").write_text("no archive")
    (tmp_path / "cut.zip").write_bytes(archive.read_bytes()[:-200])
    flipped = bytearray(archive.read_bytes())
    flipped[100] ^= 255
    (tmp_path / "flipped.zip").write_bytes(flipped)
    for name in ("text.zip", "cut.zip", "flipped.zip"):
        with pytest.raises(StudyError, match="must be an archive of mwm study --pack"):
            unpack(tmp_path / name, tmp_path / "there")
    with pytest.raises(StudyError, match="must be readable, got No such file"):
        unpack(tmp_path / "missing.zip", tmp_path / "there")
    monkeypatch.setattr("mwm.study.archive._LARGEST", 500)
    with pytest.raises(StudyError, match="must hold at most"):
        unpack(archive, tmp_path / "there")
    (tmp_path / "there" / "mine.txt").write_text("")
    with pytest.raises(StudyError, match="must be a new folder"):
        unpack(archive, tmp_path / "there")


def test_a_study_goes_on_from_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write_index(tmp_path / name / "drawn", rows_with_patients(18, 2))
    values = {"data": {"drawn": {"index": "drawn/index.csv", "prompt": "body", "folds": 3}}, "blocks": [{"data": "drawn", "arms": ["scratch"], "tasks": ["probe"]}],
              "pretrain": {"encoder": "resnet10t", "image_size": 64, "channels": 1}, "finetune": {"probe": {"bootstrap": 20}}}
    config = tmp_path / "study.yaml"
    config.write_text(yaml.safe_dump(values))

    def words(root: str, out: str, *more: str) -> list[str]:
        return ["study", str(config), "--root", str(tmp_path / root), "--out", str(tmp_path / out), "--device", "cpu", "--workers", "1", "--threads", "1", *more]

    assert main(words("a", "first", "--only", "/0")) == 0
    assert main(["study", "--pack", str(tmp_path / "cells.zip"), "--out", str(tmp_path / "first")]) == 0
    assert main(words("b", "second", "--unpack", str(tmp_path / "cells.zip"))) == 0
    capsys.readouterr()
    assert main(words("b", "second", "--only", "/1")) == 0 and "1 cells, 0 of them done" in capsys.readouterr().out
    assert main(words("b", "second", "--only", "/0")) == 0 and "1 cells, 1 of them done; 0 to run" in capsys.readouterr().out
    assert main(words("a", "first", "--only", "/1")) == 0
    first, second = ((tmp_path / out / "report" / "arms.csv").read_text() for out in ("first", "second"))
    assert first == second
