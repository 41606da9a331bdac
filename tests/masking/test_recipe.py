"""The policy recipe of CONTRIBUTING.md works as printed."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mwm.masking import UniformPolicy


@pytest.fixture
def block(monkeypatch: pytest.MonkeyPatch) -> type:
    text = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()
    source = next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class BlockPolicy" in code)
    module = types.ModuleType("recipe_block")
    monkeypatch.setitem(sys.modules, "recipe_block", module)  # dataclasses look their module up
    exec(compile(re.sub(r"^   ", "", source, flags=re.MULTILINE), "CONTRIBUTING.md", "exec"), module.__dict__)
    return module.BlockPolicy


def test_recipe_draws_pure_masks_with_the_share_it_states(block: type) -> None:
    policy, ids = block(high=0.9, low=0.3), torch.arange(300)
    hidden = torch.stack([~policy(None, grid=(7, 7), seed=0, ids=ids, epoch=epoch) for epoch in range(20)])
    assert torch.equal(hidden[3], ~policy(None, grid=(7, 7), seed=0, ids=ids, epoch=3))
    share = policy.hidden_share(torch.zeros(1, 7, 7, dtype=torch.bool)).item()
    assert abs(hidden.double().mean() - share) < 5 * 0.5 / 49 / 6000**0.5 * 2**0.5
    rows = hidden.double().mean(-1).sort(-1).values
    assert rows[..., -1].mean() > 0.85


def test_recipe_policy_can_be_matched(block: type) -> None:
    policy, request = block(), {"grid": (7, 7), "seed": 0, "ids": torch.arange(50), "epoch": 1}
    matched = UniformPolicy(match=policy)
    assert torch.equal(matched(None, **request).flatten(1).sum(1), policy(None, **request).flatten(1).sum(1))


def test_recipe_policy_is_shown_by_preview_with_the_flags_it_has_settings_for(
    block: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """preview had handed every policy the settings of region, which refused all others."""
    from mwm.cli import main
    from mwm.masking import registry

    monkeypatch.setitem(registry._POLICIES, "block", block)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        for k in range(3):
            Image.fromarray(np.tril(np.full((64, 64), 255, np.uint8), 8 * k)).save(tmp_path / folder / f"{k}.png")
    words = ["preview", str(tmp_path / "images"), "--regions", str(tmp_path / "masks"), "--image-size", "64", "--patch-size", "16", "--policy", "block",
             "--out", str(tmp_path / "out")]
    assert main([*words, "--high", "0.9", "--low", "0.3"]) == 0, capsys.readouterr().err
    assert main([*words, "--empty", "low"]) == 2
    assert "settings of block must be among high, low, got empty" in capsys.readouterr().err
