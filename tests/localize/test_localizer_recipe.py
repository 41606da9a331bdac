"""The localizer recipe of CONTRIBUTING.md works as printed."""

from __future__ import annotations

import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mwm.localize import Localizer, localize_folder


@pytest.fixture
def mine() -> type:
    text = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()
    source = next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class MineLocalizer" in code)
    module = types.ModuleType("recipe_mine")
    exec(compile(re.sub(r"^   ", "", source, flags=re.MULTILINE), "CONTRIBUTING.md", "exec"), module.__dict__)
    return module.MineLocalizer


def test_recipe_meets_the_protocol_and_localizes_a_folder(mine: type, tmp_path: Path) -> None:
    localizer = mine(device="cpu")
    assert isinstance(localizer, Localizer)
    region = localizer(torch.rand(2, 3, 20, 30), ["bright", "bright"])
    assert region.shape == (2, 20, 30) and 0 <= region.min() and region.max() <= 1
    (tmp_path / "scans").mkdir()
    Image.fromarray(np.tril(np.full((32, 32), 220, dtype=np.uint8))).save(tmp_path / "scans" / "a.png")
    assert localize_folder(tmp_path / "scans", "bright", localizer, tmp_path / "regions", progress=False).made == 1


def test_recipe_refuses_images_outside_the_range(mine: type) -> None:
    with pytest.raises(ValueError, match=r"mine: images must be in \[0, 1\]"):
        mine(device="cpu")(torch.rand(1, 1, 8, 8) * 255, ["bright"])
