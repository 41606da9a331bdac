"""`mwm info`: what a bug report needs, and a reason for every gap."""

from __future__ import annotations

import re

import pytest
import torch

from mwm.cli import main
from mwm.localize import list_localizers
from mwm.masking import list_policies
from mwm.ops import backend, native


@pytest.fixture
def text(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["info"]) == 0
    return capsys.readouterr().out


def test_info_prints_versions_processor_and_thread_runtime(text: str) -> None:
    assert torch.__version__.split("+")[0] in text
    assert f"instruction set   {native.core().isa()}" in text
    assert re.search(r"threads from +(openmp|own)", text), text


def test_info_names_every_op_and_gives_a_reason_for_every_gap(text: str) -> None:
    flat = " ".join(text.split())
    for row in backend.table():
        assert f"\n  {row['op']} " in text
        for name in ("cpu", "cuda", "triton", "reference"):
            if row[name] != "yes":
                assert row[name].replace(row["op"], "the op") in flat


def test_info_lists_localizers_and_policies(text: str) -> None:
    assert "bottleneck" in list_localizers() and "foreground" in list_policies()
    assert ", ".join(list_localizers()) in text and ", ".join(list_policies()) in text


def test_info_takes_no_further_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["info", "everything"])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("mwm: unrecognized arguments: everything")
