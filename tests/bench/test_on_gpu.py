"""bench/on_gpu.sh as far as it runs without a GPU: every stage ends well, says what it skips, and leaves a valid table."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "on_gpu.sh"
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the stages take minutes"),
    pytest.mark.skipif(shutil.which("bash") is None or shutil.which("timeout") is None, reason="needs bash and timeout"),
]


def _run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable, **environment})


def test_stages_without_a_gpu_are_skipped_by_name_and_the_table_is_valid(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "mwm").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stages.csv").write_text("stage,seconds,limit,exit code,last words\nbuild,9,120,0,skipped no CUDA device\n")  # rows of an earlier run stay
    done = _run(str(tmp_path / "out"), "sanitize", "bench", "tune", SITE=str(site))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader((tmp_path / "out" / "stages.csv").read_text().splitlines()))
    assert [row["stage"] for row in rows] == ["build", "sanitize", "bench", "tune"]
    assert all(row["exit code"] == "0" and "skipped no CUDA device" in row["last words"] for row in rows)
    assert len(list((tmp_path / "out").iterdir())) <= 8
    assert "python" in (tmp_path / "out" / "environment.txt").read_text()


def test_a_stage_without_the_package_and_an_unknown_stage_fail(tmp_path: Path) -> None:
    done = _run(str(tmp_path / "out"), "test", SITE=str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert "run the stage build first" in done.stdout
    assert _run(str(tmp_path / "out"), "polish").returncode == 2


def test_a_stage_is_cut_at_its_limit_and_says_so(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text(f'#!/bin/sh\ncase "$*" in *pytest*) sleep 30 ;; *) exec {sys.executable} "$@" ;; esac\n')
    slow.chmod(0o755)
    (tmp_path / "site" / "mwm").mkdir(parents=True)
    done = _run(str(tmp_path / "out"), "test", SITE=str(tmp_path / "site"), PYTHON=str(slow), LIMIT_TEST="1")
    assert done.returncode == 1
    assert "cut at its limit" in (tmp_path / "out" / "stages.csv").read_text()


def test_the_default_stages_end_within_nine_minutes() -> None:
    text = SCRIPT.read_text()
    limits = [int(text.split(f"LIMIT_{stage}:-")[1].split("}")[0]) for stage in ("BUILD", "TEST", "SANITIZE", "BENCH")]
    assert sum(limits) <= 540
