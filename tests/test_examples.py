"""The examples run as a user would run them."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_plain_loop_lowers_the_loss() -> None:
    losses = runpy.run_path(str(EXAMPLES / "plain_loop.py"))["main"](steps=12)
    assert all(map(math.isfinite, losses))
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


def test_spark_style_code_runs_with_the_encoder_replaced_in_twenty_lines() -> None:
    source = (EXAMPLES / "spark_style.py").read_text()
    changed = [line for line in source.splitlines() if "# " in line and line.rsplit("# ", 1)[1][:2] in {"1:", "2:", "3:", "4:", "5:"}]
    assert len(changed) == 5
    assert math.isfinite(runpy.run_path(str(EXAMPLES / "spark_style.py"))["main"]())
