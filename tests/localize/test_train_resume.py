"""A training that is killed at any step goes on as if it had not been, with the same settings and data only; half precision keeps float32 weights."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.localize.clip_folders import make

from mwm.cli import main
from mwm.localize.train import TrainReport, TrainSettings, train_localizer
from mwm.train import checkpoint


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images with masks and captions; one of them cannot be read."""
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    rows = [("file", "mask", "caption")]
    for index in range(10):
        draw = np.random.default_rng(index)
        pixels, mask = draw.integers(0, 60, (48, 48)).astype(np.uint8), np.zeros((48, 48), np.uint8)
        mask[8:24, 8 + index : 30] = 255
        Image.fromarray(np.where(mask > 0, 230, pixels).astype(np.uint8)).save(root / "images" / f"{index}.png")
        Image.fromarray(mask).save(root / "masks" / f"{index}.png")
        rows.append((f"images/{index}.png", f"masks/{index}.png", f"{('left', 'right')[index % 2]} lung of the {('chest', 'mri')[index // 5]}"))
    (root / "images" / "4.png").write_bytes((root / "images" / "4.png").read_bytes()[:100])
    with (root / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


@pytest.fixture(scope="module")
def starts(clipseg_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A CLIPSeg, and a CLIP that drops attention at random."""
    towers = make("clip", tmp_path_factory.mktemp("towers") / "clip")
    config = json.loads((towers / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part]["attention_dropout"] = 0.3
    (towers / "config.json").write_text(json.dumps(config))
    return {"head": clipseg_folder, "towers": towers}


_save = checkpoint.save


class Killed(BaseException):
    """As SIGKILL: nothing after it runs."""


class Store:
    """Checkpoints as they are, and a kill after so many of them."""

    FORMAT, load = checkpoint.FORMAT, staticmethod(checkpoint.load)

    def __init__(self, kill_after: int = 0) -> None:
        self.left, self.saved = kill_after, 0

    def save(self, path: Path, state: dict[str, Any]) -> None:
        _save(path, state)
        self.saved += 1
        if self.saved == self.left:
            raise Killed


def train(kind: str, scans: Path, starts: dict[str, Path], out: Path, *, prompts: tuple[str, ...] = ("a square", "box"), resume: bool = False, store: Any = None,
          images: Path | None = None, start: Path | None = None, **settings: Any) -> TrainReport:
    chosen = {"epochs": 3, "batch_size": 3, "lr": 1e-2 if kind == "head" else 1e-4, "workers": 0, "val_share": 0.3, **settings}
    return train_localizer(images or scans / "index.csv", None, start or starts[kind], out, prompts=prompts if kind == "head" else (), absent=["cat"], device="cpu", progress=False,
                           settings=TrainSettings(**chosen), resume=resume, checkpoints=store, checkpoint_minutes=0)


@pytest.fixture(scope="module")
def whole(scans: Path, starts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, TrainReport, int]]:
    """Trainings that nobody killed, and how many checkpoints they wrote."""
    found = {}
    for kind in starts:
        store, out = Store(), tmp_path_factory.mktemp("whole") / kind
        found[kind] = out, train(kind, scans, starts, out, store=store), store.saved
        assert found[kind][1].best > 0  # else the weights that are compared are those of the start
    return found


def history(report: TrainReport) -> str:
    return json.dumps(report.history)


@pytest.mark.parametrize("kind", ["head", "towers"])
@pytest.mark.parametrize("kills", [(1,), (3, 2), (5,), (-1,)], ids=["before the first step", "twice within epochs", "later", "after the last step"])
def test_a_killed_training_ends_as_one_that_was_not_killed(kind: str, kills: tuple[int, ...], scans: Path, starts: dict[str, Path], whole: dict, tmp_path: Path) -> None:
    expected, told, count = whole[kind]
    for number, after in enumerate(kills):
        with pytest.raises(Killed):
            train(kind, scans, starts, tmp_path / "out", store=Store(after if after > 0 else count), resume=number > 0)
        assert (tmp_path / "out.unfinished" / "checkpoint.pt").is_file() and not (tmp_path / "out").exists()
    torch.manual_seed(123)  # another process, another state of the generator
    report = train(kind, scans, starts, tmp_path / "out", store=Store(), resume=True, workers=2)
    assert history(report) == history(told) and report.best == told.best
    ours, theirs = (load_file(str(folder / "model.safetensors")) for folder in (tmp_path / "out", expected))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("kind", ["head", "towers"])
def test_a_training_killed_before_its_first_checkpoint_starts_afresh_with_resume(kind: str, scans: Path, starts: dict[str, Path], whole: dict, tmp_path: Path) -> None:
    """It had been refused: there was no checkpoint to go on with."""

    class Never(Store):
        def save(self, path: Path, state: dict[str, Any]) -> None:
            raise Killed

    for resume in (False, True):
        with pytest.raises(Killed):
            train(kind, scans, starts, tmp_path / "out", store=Never(), resume=resume)
    assert [path.name for path in (tmp_path / "out.unfinished").iterdir()] == ["asked.json"]
    assert "the seed that the training began with, 0, got 1" in _refusal(scans, starts, tmp_path / "out", store=Store(), resume=True, seed=1, kind=kind)
    torch.manual_seed(123)  # another process, another state of the generator
    report = train(kind, scans, starts, tmp_path / "out", store=Store(), resume=True)
    assert history(report) == history(whole[kind][1])
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole[kind][0] / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 100000], ids=["cut", "no mapping", "no text", "deep"])
def test_a_spoilt_note_of_a_training_without_checkpoint_is_one_sentence(content: bytes, scans: Path, starts: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "asked.json").write_bytes(content)
    assert "asked.json" in _refusal(scans, starts, tmp_path / "out", store=Store(), resume=True)


def test_checkpoints_are_as_far_apart_as_was_asked(scans: Path, starts: dict[str, Path], tmp_path: Path) -> None:
    store = Store()
    train_localizer(scans / "index.csv", None, starts["head"], tmp_path / "out", prompts=["x"], absent=["cat"], device="cpu", progress=False, checkpoints=store,
                    settings=TrainSettings(epochs=1, batch_size=3, workers=0), checkpoint_minutes=60)
    assert store.saved == 1  # before the first step


def test_no_checkpoint_holds_a_name(scans: Path, starts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train("head", scans, starts, tmp_path / "out", store=Store(4))
    content = (tmp_path / "out.unfinished" / "checkpoint.pt").read_bytes()
    assert b".png" not in content and str(scans).encode() not in content


@pytest.fixture
def killed(scans: Path, starts: dict[str, Path], tmp_path: Path) -> Path:
    with pytest.raises(Killed):
        train("head", scans, starts, tmp_path / "out", store=Store(3))
    return tmp_path / "out"


def _refusal(*arguments: Any, kind: str = "head", **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        train(kind, *arguments, **options)
    assert str(caught.value).startswith("localize train: ") and "\n" not in str(caught.value)
    return str(caught.value)


def test_other_settings_and_data_are_refused_by_name(killed: Path, scans: Path, starts: dict[str, Path], tmp_path: Path) -> None:
    again = {"store": Store(), "resume": True}
    assert "holds an unfinished training. Go on with --resume" in _refusal(scans, starts, killed, store=Store())
    assert "the lr that the training began with, 0.01, got 0.1" in _refusal(scans, starts, killed, lr=0.1, **again)
    assert "the epochs that the training began with, 3, got 4" in _refusal(scans, starts, killed, epochs=4, **again)
    assert "the precision that the training began with, 'fp32', got 'bf16'" in _refusal(scans, starts, killed, precision="bf16", **again)
    assert "the prompts that" in _refusal(scans, starts, killed, prompts=("another",), **again)
    for name in ("images/7.png", "masks/7.png"):
        other = shutil.copytree(scans, tmp_path / name.replace("/", "-"))
        Image.fromarray(np.full((48, 48), 255, np.uint8)).save(other / name)
        assert "the images, masks and captions that the training began with" in _refusal(scans, starts, killed, images=other / "index.csv", **again)
    start = shutil.copytree(starts["head"], tmp_path / "start")
    weights = load_file(str(start / "model.safetensors"))
    from safetensors.torch import save_file

    save_file({name: value * 1.01 if value.is_floating_point() else value for name, value in weights.items()}, start / "model.safetensors", {"format": "pt"})
    assert "another one" in _refusal(scans, starts, killed, start=start, **again)
    assert train("head", scans, starts, killed, **again).best >= 0  # nothing of this spoilt it


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_damaged_hostile_and_missing_checkpoints_are_one_sentence(killed: Path, scans: Path, starts: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "out.unfinished" / "checkpoint.pt"
    again, good = {"store": Store(), "resume": True}, path.read_bytes()
    path.write_bytes(good[:-50])
    assert "damaged" in _refusal(scans, starts, killed, **again)
    checkpoint.save(path, {"format": checkpoint.FORMAT, "model": {}})
    assert "must be of mwm localize train" in _refusal(scans, starts, killed, **again)
    checkpoint.save(path, {"format": checkpoint.FORMAT, "model": _Touch(tmp_path / "ran")})
    assert "more than plain values" in _refusal(scans, starts, killed, **again) and not (tmp_path / "ran").exists()
    assert "must have a training to go on with" in _refusal(scans, starts, tmp_path / "nothing", **again)
    assert "checkpoints must be given with resume" in _refusal(scans, starts, tmp_path / "nothing", resume=True)


def test_a_finished_training_is_left_as_it_is_unless_something_else_was_asked(whole: dict, scans: Path, starts: dict[str, Path], tmp_path: Path) -> None:
    out, told, _ = whole["head"]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    store = Store()
    report = train("head", scans, starts, out, store=store, resume=True)
    assert str(report) == str(told) and store.saved == 0 and {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert "the seed that the training began with, 0, got 1" in _refusal(scans, starts, out, store=store, resume=True, seed=1)
    assert "out must be a new folder" in _refusal(scans, starts, out, store=store)
    spoilt = shutil.copytree(out, tmp_path / "spoilt")
    (spoilt / "training.json").write_text("{}")
    assert "training.json" in _refusal(scans, starts, spoilt, store=store, resume=True)


@pytest.mark.parametrize("kind", ["head", "towers"])
def test_bf16_trains_nearly_as_float32_and_saves_float32(kind: str, whole: dict, scans: Path, starts: dict[str, Path], tmp_path: Path) -> None:
    exact, half = whole[kind][1], train(kind, scans, starts, tmp_path / "out", precision="bf16")
    assert history(half) != history(exact)
    assert [row["val_loss"] for row in half.history] == pytest.approx([row["val_loss"] for row in exact.history], rel=0.05)
    assert all(value.dtype == torch.float32 for value in load_file(str(tmp_path / "out" / "model.safetensors")).values() if value.is_floating_point())
    with pytest.raises(ValueError, match="precision must be fp32 or bf16, got 'fp16'"):
        TrainSettings(precision="fp16")


def test_a_training_that_diverges_leaves_nothing_to_go_on_with(scans: Path, starts: dict[str, Path], tmp_path: Path) -> None:
    assert "Lower --lr" in _refusal(scans, starts, tmp_path / "out", lr=1e30, epochs=6, store=Store())
    assert list(tmp_path.iterdir()) == []


def test_command_line_goes_on_after_a_kill_and_tells_every_epoch(scans: Path, starts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                  capsys: pytest.CaptureFixture) -> None:
    words = ["localize", "train", str(scans / "index.csv"), "--prompt", "a square", "--absent", "cat", "--checkpoint", str(starts["head"]), "--out", str(tmp_path / "out"),
             "--epochs", "2", "--batch-size", "3", "--precision", "bf16", "--checkpoint-minutes", "0", "--device", "cpu", "--workers", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", Store(3).save)
        with pytest.raises(Killed):
            main(words)
    capsys.readouterr()
    assert main(words) == 2 and "Go on with --resume" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    shown = capsys.readouterr()
    assert "epoch 2 of 2: train loss" in shown.err and "trained: head" in shown.out
    assert main([*words, "--resume"]) == 0 and "trained: head" in capsys.readouterr().out  # as often as one likes
