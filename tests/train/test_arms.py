"""The arms that a study compares: a foreground beside the region, and the region as a weight of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mwm.train import PretrainConfig, pretrain
from mwm.train.config import TrainError
from mwm.train.loader import RegionWeigher
from mwm.train.logs import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # protobuf and tensorboard


@pytest.fixture
def short(scans: Path, settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Two epochs; the left two thirds of every image are foreground."""
    (tmp_path / "bodies").mkdir()
    body = np.zeros((64, 64), np.uint8)
    body[:, :43] = 255
    for path in (scans / "images").iterdir():
        Image.fromarray(body).save(tmp_path / "bodies" / path.name)
    return {**settings, "epochs": 2, "panel_every": 2, "high": 0.8, "low": 0.4}


def hidden(run: Path) -> list[float]:
    return read_metrics(run / "metrics.csv")["hidden_share"]


def test_uniform_and_foreground_hide_as_much_as_region_at_every_step(short: dict[str, Any], tmp_path: Path) -> None:
    runs = {}
    for mask in ("region", "matched", "foreground"):
        extra = {"foreground": str(tmp_path / "bodies")} if mask == "foreground" else {}
        runs[mask] = pretrain(PretrainConfig(**{**short, **extra, "mask": mask, "out": str(tmp_path / mask)}))
    assert hidden(runs["region"]) == hidden(runs["matched"]) == hidden(runs["foreground"])
    facts = [yaml.safe_load((run / "config.yaml").read_text())["resolved"] for run in runs.values()]
    assert facts[0]["masks"]["hidden"] == facts[1]["masks"]["hidden"] == facts[2]["masks"]["hidden"]
    assert facts[2]["policy"]["name"] == "foreground" and facts[2]["policy"]["match"] == facts[0]["policy"]
    assert facts[0]["mean"] == facts[2]["mean"]
    assert len({tuple(read_metrics(run / "metrics.csv")["loss"]) for run in runs.values()}) == 3


@pytest.mark.parametrize("arm", ["foreground", "weighted", "weighted uniform"])
def test_arms_are_the_same_from_the_device_and_after_a_resume(arm: str, short: dict[str, Any], tmp_path: Path) -> None:
    arms = {"foreground": {"mask": "foreground", "foreground": str(tmp_path / "bodies")}, "weighted": {"mask": "matched", "region_weight": 2.0},
            "weighted uniform": {"mask": "uniform", "mask_ratio": 0.5, "high": None, "low": None, "region_weight": 3.0}}
    given = {**short, **arms[arm]}
    plain = pretrain(PretrainConfig(**{**given, "out": str(tmp_path / "plain")}))
    device = pretrain(PretrainConfig(**{**given, "out": str(tmp_path / "device"), "cache": "device"}))
    assert (plain / "metrics.csv").read_bytes() == (device / "metrics.csv").read_bytes()

    class Cut(Exception):
        pass

    from mwm.train import loop

    step, left = loop._Trainer._step, [4]

    def cut(self: Any, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Cut
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Trainer, "_step", cut)
        with pytest.raises(Cut):
            pretrain(PretrainConfig(**{**given, "out": str(tmp_path / "cut")}))
    again = pretrain(PretrainConfig.from_run(tmp_path / "cut"))
    assert (plain / "metrics.csv").read_bytes() == (again / "metrics.csv").read_bytes()


def test_weight_changes_the_loss_and_nothing_else_of_the_first_step(short: dict[str, Any], tmp_path: Path) -> None:
    rows = [read_metrics(pretrain(PretrainConfig(**{**short, "epochs": 1, "mask": "matched", "region_weight": weight, "out": str(tmp_path / str(weight))})) / "metrics.csv")
            for weight in (1.0, 4.0)]
    assert rows[0]["hidden_share"] == rows[1]["hidden_share"] and rows[0]["loss"][0] != rows[1]["loss"][0]
    assert abs(rows[0]["loss"][0] / rows[1]["loss"][0] - 1) < 0.5  # a mean, whatever the weight


def test_weigher_marks_the_patches_that_the_policy_calls_region() -> None:
    region = torch.zeros(2, 64, 64)
    region[0, :20, 40:] = 1
    weights = RegionWeigher(2.0, (2, 2), 0.25)(region)
    assert weights.dtype == torch.float32 and weights.tolist() == [[[1, 2], [1, 1]], [[1, 1], [1, 1]]]
    assert torch.equal(RegionWeigher(2.0, (2, 2), 0.25)(torch.stack([region, 1 - region], 1)), weights)


@pytest.mark.parametrize(("changes", "words"), [
    ({"mask": "foreground"}, "foreground must be given with mask foreground"),
    ({"foreground": "bodies"}, "foreground must be given with mask foreground, and only there"),
    ({"mask": "foreground", "foreground": "bodies", "regions": None}, "mask must be uniform without regions"),
    ({"region_weight": 0}, "region_weight must be a positive number"),
    ({"region_weight": float("nan")}, "region_weight must be a positive number"),
    ({"region_weight": 2.0, "regions": None}, "region_weight must be 1 without regions"),
])
def test_settings_that_do_not_go_together_are_one_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainError, match=words) as caught:
        PretrainConfig(**{"images": "scans", "out": "run", "regions": "regions", **changes})
    assert "\n" not in str(caught.value)
