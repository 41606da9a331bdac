"""The policy recipe of CONTRIBUTING.md works as printed: its code, put into one file of the room, is all that `mwm pretrain --mask block` needs."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mwm import masking
from mwm.cli import main
from mwm.masking import Policy, UniformPolicy, create_policy, register_policy, registry
from mwm.study.config import StudyConfig
from mwm.study.errors import StudyError
from mwm.study.sources import SUPERVISED, Source, arm
from mwm.train import PretrainConfig, TrainError


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a file into the room of policies, for the time of a test."""
    folder = tmp_path / "masking"
    folder.mkdir()
    monkeypatch.setattr(masking, "__path__", [*masking.__path__, str(folder)])
    monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))

    def put(stem: str, code: str) -> None:
        (folder / f"{stem}.py").write_text(code)
        importlib.invalidate_caches()
        monkeypatch.setitem(sys.modules, f"mwm.masking.{stem}", None)  # is taken away again at the end of the test
        del sys.modules[f"mwm.masking.{stem}"]
        masking._import_all()
        monkeypatch.delattr(masking, stem)

    return put


@pytest.fixture
def block(room: Callable[[str, str], None]) -> type:
    text = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()
    room("block", next(code for code in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if "class BlockPolicy" in code))
    return registry._POLICIES["block"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three pictures of 64 x 64 in images/, and their masks."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        for k in range(3):
            Image.fromarray(np.tril(np.full((64, 64), 255, np.uint8), 8 * k)).save(tmp_path / folder / f"{k}.png")
    return tmp_path


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


def test_recipe_policy_hides_as_many_rows_as_its_own_setting_says(block: type) -> None:
    hidden = ~create_policy("block", high=0.9, low=0.0, rows=3)(None, grid=(7, 7), seed=0, ids=torch.arange(50), epoch=0)
    assert (hidden.any(2).sum(1) == 3).all()
    assert create_policy("block", rows=9)(None, grid=(2, 4), seed=0, ids=[1], epoch=0).shape == (1, 2, 4)


def test_recipe_policy_is_shown_by_preview_with_the_flags_it_has_settings_for(block: type, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["preview", str(images / "images"), "--regions", str(images / "masks"), "--image-size", "64", "--patch-size", "16", "--policy", "block",
             "--out", str(images / "out")]
    assert main([*words, "--high", "0.9", "--low", "0.3", "--mask-setting", "rows=2"]) == 0, capsys.readouterr().err
    assert main([*words, "--empty", "low"]) == 2
    assert "settings of block must be among high, low, rows, got empty" in capsys.readouterr().err
    assert main([*words[:-4], "--policy", "region", "--mask-setting", "rows=2", *words[-2:]]) == 2
    assert "--mask-setting must be left out with --policy region" in capsys.readouterr().err


def pretrain_words(images: Path) -> list[str]:
    return ["pretrain", str(images / "images"), "--out", str(images / "run"), "--mask", "block", "--high", "0.9", "--low", "0.25", "--mask-setting", "rows=2",
            "--image-size", "128", "--encoder", "test_resnet", "--decoder-width", "32",
            "--epochs", "2", "--batch-size", "3", "--panel-every", "0", "--workers", "0", "--threads", "1", "--device", "cpu",
            "--no-progress", "--patch-size", "32"]


def test_recipe_policy_pretrains_two_steps_by_its_name_alone(block: type, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(pretrain_words(images)) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "by block" in told and "57.5%" in told  # 2 of 4 rows at 0.9, 2 at 0.25
    stored = yaml.safe_load((images / "run" / "config.yaml").read_text())
    assert (stored["mask"], stored["mask_settings"]) == ("block", {"rows": 2})
    assert stored["resolved"]["policy"] == {"name": "block", "high": 0.9, "low": 0.25, "rows": 2}
    assert len((images / "run" / "metrics.csv").read_text().splitlines()) == 1 + 2
    assert main([*pretrain_words(images), "--resume", "--mask-setting", "high=0.9"]) == 2  # given twice
    capsys.readouterr()
    again = [word if word != "rows=2" else "rows=1" for word in pretrain_words(images)]
    assert main([*again, "--resume"]) == 2
    assert "mask_settings is {'rows': 2} in the run and {'rows': 1} now" in capsys.readouterr().err


def test_recipe_policy_stands_in_the_help_of_pretrain_and_preview(block: type, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("pretrain", "preview"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        words = " ".join(capsys.readouterr().out.split())
        assert "block (Hide a band of rows, drawn per image, at `high`, the others at `low`; settings: high=0.8, low=0.4, rows=1)" in words


@pytest.mark.parametrize(("change", "sentence"), [
    ({"mask": "blck"}, "mask must be auto | region | uniform | matched | foreground | block, got 'blck'"),
    ({"mask_settings": {"row": 2}}, "settings of block must be among high, low, rows, got row"),
    ({"mask_settings": {"rows": "two"}}, "block: rows must be a whole number, got 'two'"),
    ({"mask_settings": {"rows": True}}, "block: rows must be a whole number, got True"),
    ({"mask_settings": {"rows": 0}}, "block: rows must be at least 1, got 0"),
    ({"mask_settings": {"low": [1]}}, r"block: low must be a number, got \[1\]"),
    ({"mask_settings": {"high": 0.5}, "high": 0.9}, "block: high must be given once"),
    ({"mask_settings": ["rows=2"]}, "mask_settings must be a mapping"),
    ({"high": 1.5}, r"block: high must be in \[0, 1\)"),
    ({"empty": "low"}, "settings of block must be among high, low, rows, got empty"),
    ({"mask_ratio": 0.5}, "settings of block must be among high, low, rows, got mask_ratio"),
    ({"foreground": "bodies"}, "foreground must be given with mask foreground, and only there"),
    ({"mask": "uniform", "mask_settings": {"rows": 2}}, "mask_settings must be left out with mask uniform"),
])
def test_wrong_settings_of_the_recipe_policy_end_in_one_sentence_before_any_image_is_read(block: type, change: dict, sentence: str) -> None:
    with pytest.raises(TrainError, match=sentence) as caught:
        PretrainConfig(**{"images": "i", "out": "o", "mask": "block", **change})
    assert "\n" not in str(caught.value) and str(caught.value).startswith("pretrain: ")


@pytest.mark.parametrize(("text", "sentence"), [
    ("rows", "must be NAME=VALUE"), ("=2", "must be NAME=VALUE"), ("rows=[1, 2]", "a number or a text"), ("rows=" + "[" * 5000, "a number or a text"),
    ("rows=!!python/object:os.system x", "a number or a text"), ("rows=2001-01-01", "a number or a text"),
])
def test_a_mask_setting_that_is_no_name_and_plain_value_is_refused(block: type, images: Path, capsys: pytest.CaptureFixture[str], text: str, sentence: str) -> None:
    assert main(["pretrain", str(images / "images"), "--out", str(images / "run"), "--mask", "block", "--mask-setting", text]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and len(said) < 400 and not (images / "run").exists()


def test_runs_without_a_policy_of_ones_own_say_nothing_of_its_settings() -> None:
    """config.yaml of runs of before stays the same to the byte."""
    for mask in ("auto", "uniform"):
        assert "mask_settings" not in PretrainConfig(images="i", out="o", mask=mask).to_dict()


def test_recipe_policy_is_an_arm_of_a_study(block: type) -> None:
    study = {"data": {"a": {"index": "a/index.csv", "prompt": "body"}}, "blocks": [{"data": "a", "arms": ["uniform", "block"], "tasks": ["probe"]}],
             "pretrain": {"encoder": "resnet18", "image_size": 64}, "source": {"name": "threshold"}}
    config = StudyConfig.from_dict(study)
    assert ("a", "block", ("probe",)) in list(config.cells())
    one = arm("block")
    assert one.settings == {"mask": "block"} and one.source is None and one.label(config.source_of("a")) == "no regions"
    with pytest.raises(StudyError, match=r"roi.*block, uniformNN"):
        arm("blockk")
    with pytest.raises(StudyError, match="which the study sets"):
        StudyConfig.from_dict({**study, "pretrain": {"mask_settings": {"rows": 2}}})


GUIDED = '''
from dataclasses import dataclass
from typing import ClassVar
import torch
from mwm.masking.policy import Policy
from mwm.masking.registry import register_policy
from mwm.ops import sample_active, to_q32

@register_policy
@dataclass(frozen=True)
class RestPolicy(Policy):
    """Hide everything but `overall` of the region and of what is not air."""
    name: ClassVar[str] = "rest"
    overall: float = 0.5

    @property
    def needs_foreground(self):
        return True

    def draw(self, inside, share, request):
        strata = inside.flatten(1).to(torch.int64)
        return sample_active(strata, torch.tensor([to_q32(self.overall)] * 2), num_strata=2, **request.options())

    def hidden_share(self, inside):
        return torch.full((len(inside),), self.overall, dtype=torch.float64)
'''


def test_a_policy_that_reads_regions_and_foreground_asks_for_both_and_is_named_so_in_a_study(
    room: Callable[[str, str], None], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    room("rest", GUIDED)
    given = {"images": str(images / "images"), "out": str(images / "run"), "mask": "rest"}
    with pytest.raises(TrainError, match="mask must be uniform without regions and prompt, got 'rest'"):
        PretrainConfig(**given)
    with pytest.raises(TrainError, match="foreground must be given with mask rest"):
        PretrainConfig(**given, regions="r")
    config = PretrainConfig(**given, regions="r", foreground="f", mask_ratio=0.75)
    assert config.masks_regions and config.reads_regions
    words = [word if word != "block" else "rest" for word in pretrain_words(images)]
    for flag in ("--high", "--low", "--mask-setting"):
        del words[words.index(flag) : words.index(flag) + 2]
    assert main([*words, "--regions", str(images / "masks"), "--foreground", str(images / "masks"), "--mask-ratio", "0.75"]) == 0, capsys.readouterr().err
    assert yaml.safe_load((images / "run" / "config.yaml").read_text())["resolved"]["policy"] == {"name": "rest", "overall": 0.75}
    one, source = arm("rest"), Source("crossfit", prompt="x")
    assert one.foreground and one.label(source) == f"{SUPERVISED}; foreground by threshold" and one.supervised(source)


def draws_nothing(**more: object) -> dict:
    return {"draw": lambda self, inside, share, request: None, "hidden_share": lambda self, inside: None, "__doc__": "Words.", "__module__": __name__, **more}


def test_a_policy_that_cannot_be_registered_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import dataclass

    monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))
    typed = {"__annotations__": {"name": "ClassVar[str]", "high": "float"}, "ClassVar": ClassVar}
    cases = [(type("A", (Policy,), draws_nothing(name="a")), "frozen dataclass"), (dataclass(type("B", (Policy,), draws_nothing(name="b"))), "frozen dataclass")]
    frozen = dataclass(frozen=True)
    cases += [(frozen(type("C", (Policy,), draws_nothing(name="Big Name"))), "name of small letters"),
              (frozen(type("D", (Policy,), draws_nothing())), "name of small letters"),
              (frozen(type("E", (Policy,), draws_nothing(name="e", __doc__=None))), "docstring"),
              (frozen(type("F", (Policy,), draws_nothing(name="f", **typed))), "got none for high"),
              (frozen(type("G", (Policy,), draws_nothing(name="uniform"))), "which is taken"), (frozen(type("H", (Policy,), draws_nothing(name="matched"))), "which is taken")]
    for policy, words in cases:
        with pytest.raises((TypeError, ValueError), match=words) as caught:
            register_policy(policy)
        assert "\n" not in str(caught.value)
    assert set(registry._POLICIES) == set(masking.list_policies()) and "matched" not in registry._POLICIES
