from __future__ import annotations

import csv
from pathlib import Path

import pytest

from mwm.data import SkippedFiles
from mwm.data.csv_cells import file_cell, text_cell

FORMULAS = ["=HYPERLINK(0)", "+1+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1"]
PLAIN = ["scan.png", "a/b=c.png", "./scan.png", "'quoted'", "'", ""]


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_begins_like_a_formula(text: str) -> None:
    assert file_cell(text) == f"./{text}" and text_cell(text) == f"'{text}"


@pytest.mark.parametrize("text", PLAIN)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert file_cell(text) == text_cell(text) == text


def test_a_file_cell_names_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "=1.png").touch()
    assert (tmp_path / file_cell("=1.png")).samefile(tmp_path / "=1.png")


@pytest.mark.parametrize("label", ["-1", "+1", "-0.5", "1", "-1e3"])
def test_labels_that_are_numbers_stay_numbers(label: str) -> None:
    assert text_cell(label) == label


def test_the_list_of_skipped_files_holds_no_formula(tmp_path: Path) -> None:
    skipped = SkippedFiles()
    skipped.add("=1+1.png", "=no image")
    skipped.write(tmp_path / "skipped.csv")
    with (tmp_path / "skipped.csv").open(newline="") as file:
        assert list(csv.reader(file))[1] == ["./=1+1.png", "'=no image"]


def test_every_file_that_writes_a_csv_of_names_asks_for_cells() -> None:
    """What copies a list of the user's (study/folds.py) is exempt."""
    package = Path(__file__).resolve().parents[2] / "python" / "mwm"
    own = {"study/folds.py"}
    writers = {str(path.relative_to(package)) for path in package.rglob("*.py") if "csv.writer(" in path.read_text() or "csv.DictWriter(" in path.read_text()}
    forgetful = {name for name in writers - own if "csv_cells" not in (package / name).read_text()}
    assert not forgetful
