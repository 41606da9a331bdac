"""The committed verdicts of `sweep_models.py`: none is wrong, each refusal says where, and what the READMEs count is what the table holds."""

from __future__ import annotations

import collections
import csv
from pathlib import Path

import pytest
import timm
from sweep_models import TABLE, nets

ROWS = list(csv.DictReader(TABLE.read_text(encoding="utf-8").splitlines()))
SWEPT = "1.0.31"  # timm's version
ROOT = Path(__file__).parents[2]


def counts(form: str, library: str) -> collections.Counter:
    return collections.Counter(row["verdict"] for row in ROWS if row["form"] == form and row["name"].startswith("torchvision/") == (library == "torchvision"))


def test_no_swept_net_is_wrong_or_ends_in_an_error() -> None:
    assert {row["verdict"] for row in ROWS} == {"right", "refused", "unbuilt"}
    assert not [row for row in ROWS if row["verdict"] == "unbuilt" and row["form"] != "pyramid"]


def test_each_refusal_names_a_module_and_a_reason() -> None:
    refused = [row for row in ROWS if row["verdict"] == "refused"]
    assert len(refused) > 100
    assert not [row for row in refused if "module" not in row["reason"]]


@pytest.mark.skipif(timm.__version__ != SWEPT, reason=f"swept with timm {SWEPT}")
def test_every_net_of_timm_and_torchvision_has_a_row() -> None:
    swept = {(row["name"], row["form"]) for row in ROWS}
    assert {net[:2] for net in nets(None)} <= swept


@pytest.mark.parametrize(("form", "library"), [("classifier", "timm"), ("pyramid", "timm"), ("classifier", "torchvision"), ("pyramid", "torchvision"), ("backbone", "torchvision")])
def test_the_room_readme_counts_what_the_table_holds(form: str, library: str) -> None:
    found = counts(form, library)
    line = f"| {library}, {form}s | {sum(found.values())} | {found['right']} | {found['refused']} | {found['unbuilt']} |"
    assert line in (ROOT / "python/mwm/sparse/README.md").read_text(encoding="utf-8")
