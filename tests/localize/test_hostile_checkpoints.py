"""Model folders that want to run code, hang, or take all memory end in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.localize.clip_folders import make

from mwm.localize import create_localizer
from mwm.localize.pretrained import read_pretrained
from mwm.localize.protocol import default_device
from mwm.localize.train_towers import _KINDS


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    for kind in ("clip", "dual-vit"):
        make(kind, root / kind)
    return root


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_processor_with_code_does_not_run_and_nobody_is_asked(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks "[y/N]" on the terminal, and runs it after a y, where trust_remote_code is not said."""
    folder = shutil.copytree(clips / "dual-vit", tmp_path / "dual")
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Evil\n")
    edit(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    edit(folder / "preprocessor_config.json", image_processor_type="Evil", auto_map={"AutoImageProcessor": "evil.Evil", "AutoProcessor": "evil.Evil"})
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    with pytest.raises(ValueError, match=r"^bottleneck: checkpoint .* cannot be read"):
        read_pretrained(folder, "bottleneck", _KINDS, "owner/model")
    assert not asked and not (folder / "ran").exists()


def test_a_pipe_in_a_model_folder_is_refused_instead_of_waited_for(clips: Path, clipseg_folder: Path, tmp_path: Path) -> None:
    def late(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    try:
        for name, source in (("clipseg", clipseg_folder), ("bottleneck", clips / "clip")):
            folder = shutil.copytree(source, tmp_path / name)
            os.mkfifo(folder / "more.json")
            signal.alarm(30)
            with pytest.raises(ValueError, match=rf"^{name}: checkpoint must hold regular files, got 'more.json'"):
                create_localizer(name, checkpoint=folder, device="cpu")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("changes", [{"size": {"height": 100_000, "width": 100_000}}, {"image_std": [0.2, 0.0, 0.2]}, {"image_mean": [float("nan")] * 3}, {"image_mean": [0.5]},
                                     {"resample": None}])
def test_image_settings_that_are_none_are_refused(clipseg_folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = shutil.copytree(clipseg_folder, tmp_path / "clipseg")
    stored = json.loads((folder / "processor_config.json").read_text())
    stored["image_processor"] |= changes
    (folder / "processor_config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="image processor must"):
        create_localizer("clipseg", checkpoint=folder, device="cpu")


@pytest.mark.parametrize("name", ["meta", "mps", "xla", "", "cuda:99", "gpu"])
def test_a_device_that_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="localize: device must be"):
        default_device(name)
