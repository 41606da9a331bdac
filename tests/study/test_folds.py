"""Folds by patient: what may never share a split, what every split must hold, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mwm.data import DataError, read_list
from mwm.study.errors import StudyError
from mwm.study.folds import PARTS, assign, write_folds
from mwm.study.index import read_index
from mwm.study.partition import partition

#: Images per patient of brain MRI: glioma, meningioma, pituitary tumour. Six meningioma blocks on five folds is the hard case.
BRAIN = ((63, 42, 38, 28, 28, 27, 26, 24, 24, 22, 17, 16, 14), (31, 29, 26, 25, 24, 18), (33, 31, 31, 28, 23, 22, 21, 17, 12, 9))


def _index(folder: Path, rows: list[tuple[str, str, str, str]], *, subset: str = "a", images: bool = True) -> Path:
    """rows: (file, split, label, patient)."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "index.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "split", "label", "patient", "subset", "mask", "note"])
        writer.writerows([(*row, subset, "", "kept, as it was") for row in rows])
    if images:
        for k, row in enumerate(rows):
            (folder / row[0]).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4), k % 256, dtype=np.uint8)).save(folder / row[0])
    return folder / "index.csv"


def _rows(patients: int = 6, each: int = 2) -> list[tuple[str, str, str, str]]:
    return [(f"images/{label}{p}_{k}.png", "train", label, f"{label}{p}") for label in ("cyst", "scar") for p in range(patients) for k in range(each)]


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_partition_of_the_brain_blocks_is_even_and_complete() -> None:
    counts = np.zeros((29, 3), dtype=int)
    counts[np.arange(29), np.repeat([0, 1, 2], [13, 6, 10])] = np.concatenate(BRAIN)
    parts = partition(counts, (0.2,) * 5, seed=0)
    images = np.array([counts[parts == f].sum(0) for f in range(5)])
    assert (images > 0).all()
    assert np.ptp(images.sum(1)) <= 0.1 * images.sum()
    assert np.ptp(images[:, 0]) <= 20 and np.ptp(images[:, 2]) <= 20
    assert (parts == partition(counts, (0.2,) * 5, seed=0)).all()


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), folds=st.integers(3, 5), extra=st.integers(0, 12))
def test_every_patient_is_tested_once_and_no_patient_is_split(seed: int, folds: int, extra: int) -> None:
    from mwm.data.table import Row
    from mwm.study.index import Indexed

    generator = np.random.default_rng(seed)
    rows = [Row(f"i{p}_{k}.png", label="abc"[p % 3], patient=f"p{p}") for p in range(3 * folds + extra) for k in range(generator.integers(1, 9))]
    rows += [Row("u0.png", patient="p0"), Row("u1.png", patient="free"), Row("u2.png", split="unlabelled", label="a", patient="p1")]
    data = Indexed(("file",), tuple(rows), tuple({} for _ in rows))
    splits, _ = assign(data, folds=folds, seed=seed)
    times = np.zeros(len(rows), dtype=int)
    for column in splits:
        where: dict[str, set[str]] = {}
        for row, split in zip(rows, column, strict=True):
            where.setdefault(row.patient, set()).add({"unlabelled": "train"}.get(split, split))
        assert all(len(found - {""}) == 1 for found in where.values())
        assert "unlabelled" in {column[-2]}
        for part in PARTS:
            assert {row.label for row, split in zip(rows, column, strict=True) if split == part} == {"a", "b", "c"}
        times += [split == "test" for split in column]
    assert (times[:-3] == 1).all() and not times[-3:].any()


def test_written_folds_keep_names_columns_and_ids(tmp_path: Path) -> None:
    index = _index(tmp_path / "data", [*_rows(), ("images/u.png", "unlabelled", "", "x")])
    folds = write_folds(index, tmp_path / "out", seed=3)
    assert len(folds.paths) == 5 and not folds.descriptive and folds.patients == {"cyst": 6, "scar": 6}
    before = {record.name: record.id for record in read_list(index)}
    for path, pretrain in zip(folds.paths, folds.pretrain, strict=True):
        assert {record.name: record.id for record in read_list(path)} == before
        assert {row["note"] for row in _read(path)} == {"kept, as it was"}
        seen = {row["file"] for row in _read(pretrain)}
        assert seen == {row["file"] for row in _read(path) if row["split"] in ("train", "unlabelled")} and "images/u.png" in seen
        assert {row["split"] for row in _read(pretrain)} == {"train"}
    facts = json.loads((folds.paths[0].parent / "folds.json").read_text())
    assert facts["counts"][0]["test"]["cyst"]["patients"] >= 1 and str(tmp_path) not in json.dumps(facts)


def test_other_seeds_give_other_folds_and_the_same_seed_the_same(tmp_path: Path) -> None:
    index = _index(tmp_path / "data", _rows(12, 2))
    data = read_index(index)
    assert assign(data, seed=1) == assign(data, seed=1)
    assert assign(data, seed=1) != assign(data, seed=2)


def test_folds_of_a_running_study_are_not_replaced(tmp_path: Path) -> None:
    index = _index(tmp_path / "data", _rows())
    write_folds(index, tmp_path / "out", seed=0)
    write_folds(index, tmp_path / "out", seed=0)
    with pytest.raises(StudyError, match="folds must stay as they were"):
        write_folds(index, tmp_path / "out", seed=1)


def test_few_patients_are_described_only(tmp_path: Path) -> None:
    index = _index(tmp_path / "data", _rows(3))
    folds = write_folds(index, tmp_path / "out", folds="fit")
    assert len(folds.paths) == 3 and folds.descriptive


@pytest.mark.parametrize(("change", "words"), [
    (lambda rows: [*rows, ("images/t.png", "train", "cysts", "q")], "typing error for 'cyst'"),
    (lambda rows: [row for row in rows if row[2] == "cyst"], "at least two classes"),
    (lambda rows: [("../" + row[0], *row[1:]) for row in rows], "must stay inside"),
    (lambda rows: [*rows, rows[3]], "each image must be listed once, got '.*' 2 times"),
    (lambda rows: [*rows, ("./" + rows[3][0], "train", "scar" if rows[3][2] == "cyst" else "cyst", rows[3][3])], "each image must be listed once"),
    (lambda rows: [(*row[:2], "Cyst", row[3]) if k % 2 and row[2] == "cyst" else row for k, row in enumerate(rows)], "written in one way, got 'Cyst' and 'cyst'"),
])
def test_bad_indices_are_refused_in_a_sentence(tmp_path: Path, change, words: str) -> None:
    index = _index(tmp_path / "data", change(_rows()), images=False)
    with pytest.raises((StudyError, DataError), match=words):
        write_folds(index, tmp_path / "out")
    assert not (tmp_path / "out").exists()  # nothing is copied before


def test_labels_subset_and_missing_files_are_named(tmp_path: Path) -> None:
    index = _index(tmp_path / "data", _rows())
    with pytest.raises(StudyError, match="is it 'scar'"):
        write_folds(index, tmp_path / "out", labels=["cyst", "scars"])
    with pytest.raises(StudyError, match="subset must occur"):
        write_folds(index, tmp_path / "out", subset="b")
    with pytest.raises(StudyError, match="which is not there"):
        write_folds(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "data/images/cyst0_0.png").unlink()
    with pytest.raises(DataError, match="got none at"):
        write_folds(index, tmp_path / "out")


def test_a_patient_with_two_classes_stays_whole(tmp_path: Path) -> None:
    rows = [*_rows(), ("images/both.png", "test", "scar", "cyst0")]
    folds = write_folds(_index(tmp_path / "data", rows), tmp_path / "out")
    for path in folds.paths:
        assert len({row["split"] for row in _read(path) if row["patient"] == "cyst0"}) == 1
