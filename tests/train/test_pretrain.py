"""A run from a folder of pictures to an encoder, and every way it may be refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from mwm.train import PretrainConfig, TrainError, checkpoint, load_encoder, pretrain
from mwm.train.logs import COLUMNS, read_metrics

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # protobuf and tensorboard


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_leaves_an_encoder_and_everything_that_tells_how_it_came_about(config: PretrainConfig, capsys: pytest.CaptureFixture) -> None:
    run = pretrain(config, command="mwm pretrain scans")
    printed = capsys.readouterr().out
    assert "regions: 18 images, grid 3x3" in printed and "hidden:  inside" in printed
    names = set(os.listdir(run))
    assert {"config.yaml", "run.json", "metrics.csv", "tensorboard", "panels", "checkpoint.pt", "encoder.safetensors", "model.safetensors", "config.json"} <= names
    facts = json.loads((run / "run.json").read_text())
    assert facts["command"] == "mwm pretrain scans" and facts["seed"] == 3 and facts["threads"] == 1 and facts["status"] == "finished"
    assert {"commit", "torch", "device", "wall_time_seconds", "image_list", "localizer", "world_size"} <= set(facts)
    metrics = read_metrics(run / "metrics.csv")
    assert tuple(metrics) == COLUMNS
    assert metrics["step"] == list(range(1, 13))
    assert all(0.3 < share < 0.9 for share in metrics["hidden_share"])
    assert sorted(path.name for path in (run / "panels").iterdir()) == ["epoch_0002.png", "epoch_0003.png"]
    with Image.open(run / "panels" / "epoch_0002.png") as picture:
        assert picture.width > 200
    resolved = yaml.safe_load((run / "config.yaml").read_text())["resolved"]
    assert 0.4 < resolved["policy"]["empty_share"] < 0.8
    assert len(resolved["mean"]) == len(resolved["std"]) == 1
    encoder = load_encoder(run, num_classes=2)
    assert encoder.preprocessing.size == (96, 96) and encoder.preprocessing.channels == 1
    loaded = timm.create_model(f"local-dir:{run}", num_classes=3)
    assert set(loaded.load_state_dict(load_file(run / "model.safetensors"), strict=False).missing_keys) == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("cache", ["ram", "disk", "device"])
def test_a_cache_of_decoded_images_changes_no_number(cache: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    short = {**settings, "epochs": 2, "panel_every": 0}
    plain = pretrain(PretrainConfig(**short))
    cached = pretrain(PretrainConfig(**{**short, "cache": cache, "workers": 2, "out": settings["out"] + "2"}))
    assert (plain / "metrics.csv").read_bytes() == (cached / "metrics.csv").read_bytes()


def test_the_loss_falls(settings: dict[str, Any]) -> None:
    run = pretrain(PretrainConfig(**{**settings, "epochs": 15, "drop_path": 0.0, "base_lr": 0.2, "checkpoint_steps": 0, "panel_every": 0}))
    losses = read_metrics(run / "metrics.csv")["loss"]
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])  # most of a hidden patch is noise that nothing can predict


def test_the_python_interface_is_short(scans: Path, tmp_path: Path) -> None:
    run = pretrain(PretrainConfig(images=scans / "images", regions=scans / "masks", encoder="test_convnext", out=tmp_path / "run", image_size=64,
                                  decoder_width=32, epochs=1, batch_size=4, progress=False, workers=0, min_std=0.05))
    assert (run / "encoder.safetensors").is_file()


def test_a_run_without_regions_hides_uniformly(settings: dict[str, Any]) -> None:
    run = pretrain(PretrainConfig(**{**settings, "regions": None, "mask_ratio": 0.5, "epochs": 1, "precision": "bf16", "drop_path": 0.0,
                                    "encoder": "torchvision/resnet18"}))
    assert set(read_metrics(run / "metrics.csv")["hidden_share"]) <= {4 / 9, 5 / 9, *(k / 36 for k in range(16, 21))}
    assert yaml.safe_load((run / "config.yaml").read_text())["resolved"]["policy"]["name"] == "uniform"
    assert not (run / "model.safetensors").exists()


def test_matched_masks_hide_as_many_patches_as_region_masks(settings: dict[str, Any]) -> None:
    short = {**settings, "epochs": 1, "panel_every": 0, "crop_scale": (1.0, 1.0)}
    region = pretrain(PretrainConfig(**short))
    matched = pretrain(PretrainConfig(**{**short, "mask": "matched", "out": settings["out"] + "2"}))
    one, two = (read_metrics(run / "metrics.csv") for run in (region, matched))
    assert one["hidden_share"] == two["hidden_share"]
    assert one["loss"] != two["loss"]


def test_a_prompt_is_localized_once_and_its_regions_are_stored(settings: dict[str, Any], scans: Path) -> None:
    calls = []

    def localize(config: PretrainConfig) -> tuple[str, str]:
        calls.append(config.prompt)
        return str(scans / "masks"), "fingerprint"

    short = {**settings, "regions": None, "prompt": "the disc", "epochs": 1, "panel_every": 0}
    run = pretrain(PretrainConfig(**short), localize=localize)
    pretrain(PretrainConfig(**short, resume=True), localize=localize)
    assert calls == ["the disc"]
    assert json.loads((run / "run.json").read_text())["localizer"] == "fingerprint"
    assert yaml.safe_load((run / "config.yaml").read_text())["regions"] == str(scans / "masks")


def test_an_existing_run_is_kept_unless_overwrite_is_said(settings: dict[str, Any]) -> None:
    short = {**settings, "epochs": 1, "panel_every": 0}
    run = pretrain(PretrainConfig(**short))
    before = _files(run)
    with pytest.raises(TrainError, match=r"holds a run already. Continue it with --resume, replace it with --overwrite"):
        pretrain(PretrainConfig(**short))
    with pytest.raises(ValueError, match="absent"):  # refused before anything is removed
        pretrain(PretrainConfig(**{**short, "images": "absent", "overwrite": True}))
    assert _files(run) == before
    pretrain(PretrainConfig(**{**short, "overwrite": True, "seed": 4}))
    assert _files(run)["metrics.csv"] != before["metrics.csv"]


def test_a_folder_of_other_things_is_never_overwritten(settings: dict[str, Any]) -> None:
    out = Path(settings["out"])
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(TrainError, match="holds other files"):
        pretrain(PretrainConfig(**settings, overwrite=True))
    assert (out / "thesis.txt").read_text() == "mine"


def test_an_unreadable_file_is_skipped_counted_and_listed(settings: dict[str, Any], scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = shutil.copytree(scans / "images", tmp_path / "images")
    (images / "scan_07.png").write_bytes((images / "scan_07.png").read_bytes()[:100])
    short = {**settings, "images": str(images), "epochs": 1, "panel_every": 0}
    run = pretrain(PretrainConfig(**short))
    assert "scan_07.png" in (run / "skipped.csv").read_text()
    assert "skipped: 1 files" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(TrainError, match=r"scan_07\.png"):
        pretrain(PretrainConfig(**{**short, "strict": True, "out": settings["out"] + "2"}))


@pytest.mark.parametrize(("changes", "words"), [
    ({"images": "absent-folder"}, "absent-folder"),
    ({"encoder": "resnet_18"}, "no model of timm"),
    ({"patch_size": 16}, "32"),
    ({"encoder": "torchvision/resnet18"}, "drop_path must be 0 for torchvision/resnet18"),
    ({"decoder_width": 20}, "decoder_width must be a multiple of 32"),
    ({"low": 0.5}, "high and low must be given together"),
])
def test_a_run_that_cannot_start_says_why_and_writes_nothing(settings: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        pretrain(PretrainConfig(**{**settings, **changes}))
    assert len(str(caught.value).strip().splitlines()) == 1
    assert not Path(settings["out"]).exists()


def test_a_folder_without_images_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        pretrain(PretrainConfig(**{**settings, "images": str(tmp_path / "empty")}))


def test_regions_that_are_all_empty_are_refused(settings: dict[str, Any], scans: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in (scans / "masks").iterdir():
        Image.new("L", (64, 64)).save(masks / path.name)
    with pytest.raises(ValueError, match=r"at least one region must be non-empty.*Change the prompt"):
        pretrain(PretrainConfig(**{**settings, "regions": str(masks)}))


def test_a_region_of_another_shape_is_refused_in_one_sentence(settings: dict[str, Any], scans: Path, tmp_path: Path) -> None:
    masks = shutil.copytree(scans / "masks", tmp_path / "masks")
    Image.new("L", (64, 32), 255).save(masks / "scan_04.png")
    with pytest.raises(ValueError, match="64") as caught:
        pretrain(PretrainConfig(**{**settings, "regions": str(masks)}))
    assert len(str(caught.value).splitlines()) == 1 and not Path(settings["out"]).exists()


@pytest.mark.parametrize(("mask", "warned"), [("auto", True), ("uniform", False)])
def test_prompts_of_the_index_that_nothing_reads_are_spoken_of(settings: dict[str, Any], scans: Path, tmp_path: Path, mask: str, warned: bool,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    names = [path.name for path in sorted((scans / "images").iterdir())]
    index = tmp_path / "index.csv"
    index.write_text("\n".join(["file,prompt", *(f"{name},{'the disc' if k < 3 else ''}" for k, name in enumerate(names))]) + "\n")
    for name in names:
        shutil.copy(scans / "images" / name, tmp_path / name)
    pretrain(PretrainConfig(**{**settings, "images": str(index), "regions": None, "mask": mask, "mask_ratio": 0.5, "epochs": 1, "panel_every": 0}))
    said = capsys.readouterr().out
    assert ("warning: 3 of 18 images have a prompt in the index, and nothing reads it" in said) is warned


def test_a_prompt_without_a_localizer_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(TrainError, match="Make them with `mwm localize`"):
        pretrain(PretrainConfig(**{**settings, "regions": None, "prompt": "the disc"}))


def test_a_nan_loss_stops_the_run_and_keeps_the_checkpoint(settings: dict[str, Any]) -> None:
    with pytest.raises(TrainError, match=r"the loss or gradient of step \d+ is not finite.*Lower --base-lr"):
        pretrain(PretrainConfig(**{**settings, "base_lr": 1e30, "clip": None, "epochs": 9, "checkpoint_steps": 1, "warmup_epochs": 8.0}))
    state = checkpoint.load(Path(settings["out"]) / checkpoint.NAME)
    assert state["step"] >= 1
    assert read_metrics(Path(settings["out"]) / "metrics.csv")["step"][: state["step"]] == list(range(1, state["step"] + 1))


def test_a_checkpoint_of_another_model_is_refused(settings: dict[str, Any]) -> None:
    short = {**settings, "epochs": 1, "panel_every": 0}
    run = pretrain(PretrainConfig(**short))
    other = pretrain(PretrainConfig(**{**short, "decoder_width": 64, "out": settings["out"] + "2"}))
    shutil.copy(other / checkpoint.NAME, run / checkpoint.NAME)
    with pytest.raises(TrainError, match=r"belongs to another run \(decoder_width is 64 there and 32"):
        pretrain(PretrainConfig(**short, resume=True))


_FULL_DISK = """
import resource
from mwm.train import PretrainConfig, pretrain
resource.setrlimit(resource.RLIMIT_FSIZE, (QUOTA, resource.RLIM_INFINITY))
try:
    pretrain(PretrainConfig(**SETTINGS))
except ValueError as error:
    open(SAID, "w").write(str(error))
"""


def test_a_full_disk_ends_in_one_sentence_and_the_run_can_go_on(settings: dict[str, Any], tmp_path: Path, start_process: Callable) -> None:
    short = {**settings, "epochs": 1, "panel_every": 0}
    whole = pretrain(PretrainConfig(**short))
    short["out"] += "2"
    quota = (whole / checkpoint.NAME).stat().st_size - 1000
    process = start_process(_FULL_DISK, SETTINGS=short, QUOTA=quota, SAID=str(tmp_path / "said"))
    process.join(timeout=120)
    said = (tmp_path / "said").read_text()
    assert said.startswith("checkpoint.pt: the disk is full") and len(said.splitlines()) == 1
    run = pretrain(PretrainConfig(**short, resume=True))
    assert (run / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert all(torch.equal(a, b) for a, b in zip(load_file(run / "encoder.safetensors").values(), load_file(whole / "encoder.safetensors").values(), strict=True))
