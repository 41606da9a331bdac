"""An open_clip checkpoint cannot have code run, nor have other models fetched, by what its settings say."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.localize.clip_folders import make

from mwm.localize.towers import load_tower

pytestmark = pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("open-clip-bert", tmp_path_factory.mktemp("open_clip") / "bert")


def hostile(folder: Path, target: Path, where: str, **changes: Any) -> Path:
    """A copy whose settings have other values in `text_cfg` or `vision_cfg`, and which carries code that leaves a mark when it runs."""
    shutil.copytree(folder, target)
    stored = json.loads((target / "open_clip_config.json").read_text())
    stored["model_cfg"][where].update(changes)
    (target / "open_clip_config.json").write_text(json.dumps(stored))
    (target / "evil.py").write_text(f"open({str(target / 'ran')!r}, 'w')\nfrom transformers import BertConfig as Config, PreTrainedTokenizerFast as Tokenizer\n")
    return target


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        load_tower(folder, "cpu")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("bottleneck: ")
    assert not (folder / "ran").exists()


def test_settings_that_tell_the_tokenizer_to_trust_code_are_refused_and_nothing_runs(bert: Path, tmp_path: Path) -> None:
    folder = hostile(bert, tmp_path / "one", "text_cfg", hf_model_name=str(bert), tokenizer_kwargs={"trust_remote_code": True})
    edit(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    refused(folder, "tokenizer_kwargs in open_clip_config.json must be among .* 'trust_remote_code'")


def test_a_tokenizer_with_code_does_not_run_and_nobody_is_asked(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hostile(bert, tmp_path / "two", "text_cfg")
    edit(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    edit(folder / "config.json", model_type="bert")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    try:
        load_tower(folder, "cpu")
    except ValueError as error:
        assert str(error).startswith("bottleneck: ")
    assert not (folder / "ran").exists()


def test_a_text_model_with_code_is_refused_and_nobody_is_asked(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hostile(bert, tmp_path / "three", "text_cfg")
    edit(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    refused(folder, "must be one of transformers' own")


def test_models_that_a_folder_points_at_are_not_fetched(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_: Any, **__: Any) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr("socket.socket.connect", called)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = hostile(bert, tmp_path / "four", "text_cfg", hf_model_name="somebody/model")
    (folder / "config.json").unlink()
    refused(folder, "must hold config.json of its text model 'somebody/model'")
    refused(hostile(bert, tmp_path / "five", "vision_cfg", timm_model_name="hf-hub:somebody/model"), "timm_model_name in open_clip_config.json must be the plain name")


def test_a_folder_that_holds_its_text_models_configuration_needs_no_hub_name_of_it(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    folder = hostile(bert, tmp_path / "six", "text_cfg", hf_model_name="microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract")
    assert load_tower(folder, "cpu").text(["both lungs"]).shape == (1, 32)


@pytest.mark.parametrize("text", ["[1]", "{}", '{"model_cfg": {"text_cfg": 1, "vision_cfg": {}}}', "[" * 100_000, '{"model_cfg": 3}', "not json"])
def test_settings_that_are_none_end_in_one_sentence(bert: Path, tmp_path: Path, text: str) -> None:
    folder = hostile(bert, tmp_path / "seven", "text_cfg")
    (folder / "open_clip_config.json").write_text(text)
    before = sys.getrecursionlimit()
    refused(folder, "open_clip_config.json must ")
    assert sys.getrecursionlimit() == before
