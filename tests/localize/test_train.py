"""Training a localizer: a small CLIPSeg on masks, a small CLIP on captions; the saved folder answers through the public call."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mwm
from mwm.data import ReadSettings, read_image, read_list
from mwm.localize.train import TrainSettings, train_localizer
from mwm.localize.train_data import list_examples, mask_store


def picture(index: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with one bright square, and its mask. uint8 [64, 64]"""
    draw = np.random.default_rng(index)
    pixels, mask = draw.integers(0, 60, (64, 64)).astype(np.uint8), np.zeros((64, 64), np.uint8)
    top, left = draw.integers(4, 36, 2)
    mask[top : top + 24, left : left + 24] = 255
    pixels[mask > 0] = 230
    return pixels, mask


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    for index in range(20):
        pixels, mask = picture(index)
        Image.fromarray(pixels).save(root / "images" / f"{index}.png")
        Image.fromarray(mask).save(root / "masks" / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def learner_folder(clipseg_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPSeg whose text decides at the last layer of the decoder, and whose texts differ: it learns within seconds."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    folder = tmp_path_factory.mktemp("learner") / "model"
    shutil.copytree(clipseg_folder, folder)
    config = CLIPSegConfig.from_pretrained(clipseg_folder)
    config.conditional_layer = 2
    torch.manual_seed(7)
    model = CLIPSegForImageSegmentation(config)
    with torch.no_grad():
        for name, parameter in model.clip.text_model.named_parameters():
            parameter.mul_(20 if name.endswith("token_embedding.weight") else 4 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    return folder


QUICK = {"batch_size": 4, "lr": 3e-2, "absent_share": 0.4}


@pytest.fixture(scope="module")
def trained(scans: Path, learner_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    out = tmp_path_factory.mktemp("trained") / "square"
    report = train_localizer(scans / "images", scans / "masks", learner_folder, out, prompts=["a square"], absent=["cat"], device="cpu", progress=False,
                             settings=TrainSettings(epochs=15, workers=0, **QUICK))
    return out, report


def dice(localizer: object, prompt: str, scans: Path) -> float:
    found = []
    for record in list(read_list(scans / "images"))[:8]:
        truth = torch.from_numpy(np.asarray(Image.open(scans / "masks" / record.path.name)) > 0)
        region = localizer(read_image(record, ReadSettings())[None], [prompt])[0] > 0.5
        found.append(2 * int((region & truth).sum()) / max(1, int(region.sum()) + int(truth.sum())))
    return float(np.mean(found))


def test_loss_falls_and_the_saved_head_finds_what_it_learned(trained: tuple[Path, object], scans: Path, learner_folder: Path) -> None:
    out, report = trained
    losses = [row["val_loss"] for row in report.history]
    assert report.kind == "head" and report.best > 0 and losses[report.best] == min(losses) < 0.3 * losses[0]
    before, after = (mwm.create_localizer("clipseg", checkpoint=folder, device="cpu") for folder in (learner_folder, out))
    assert dice(after, "a square", scans) > 0.5 and dice(after, "a square", scans) > dice(before, "a square", scans) + 0.1
    assert before.fingerprint != after.fingerprint


def test_saved_head_still_reads_the_text(trained: tuple[Path, object], scans: Path) -> None:
    localizer = mwm.create_localizer("clipseg", checkpoint=trained[0], device="cpu")
    assert dice(localizer, "cat", scans) < 0.3 * dice(localizer, "a square", scans)


def test_clip_inside_a_trained_clipseg_is_untouched(trained: tuple[Path, object], learner_folder: Path) -> None:
    from safetensors.torch import load_file

    before, after = (load_file(str(folder / "model.safetensors")) for folder in (learner_folder, trained[0]))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before if not key.startswith("decoder"))
    assert any(not torch.equal(before[key], after[key]) for key in before if key.startswith("decoder"))


def test_training_repeats_itself_and_its_record_names_no_file(trained: tuple[Path, object], scans: Path, clipseg_folder: Path, tmp_path: Path) -> None:
    out, report = trained
    losses = []
    for name, workers in (("one", 2), ("two", 0)):
        found = train_localizer(scans / "images", scans / "masks", clipseg_folder, tmp_path / name, prompts=["a square", "box"], absent=["cat"], device="cpu", progress=False,
                                settings=TrainSettings(epochs=2, workers=workers, **QUICK))
        losses.append([row["val_loss"] for row in found.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    told = json.loads((out / "training.json").read_text())
    assert told["best"] == report.best and ".png" not in (out / "training.json").read_text() and told["prompts"] == ["a square"]


@pytest.fixture(scope="module")
def clip_folder(clipseg_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = AutoTokenizer.from_pretrained(clipseg_folder)
    width = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    torch.manual_seed(3)
    CLIPModel(CLIPConfig(
        text_config={**width, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
                     "pad_token_id": tokenizer.pad_token_id},
        vision_config={**width, "image_size": 64, "patch_size": 16}, projection_dim=32)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("captions")
    rows = [("file", "patient", "caption")]
    for index in range(36):
        draw = np.random.default_rng(index)
        side, bright = ("left", "right")[index % 2], ("dark", "bright")[index // 2 % 2]
        pixels = draw.integers(0, 40, (64, 64)).astype(np.uint8)
        half = slice(0, 32) if side == "left" else slice(32, 64)
        pixels[8:56, half] += 200 if bright == "bright" else 90
        Image.fromarray(pixels).save(root / f"{index}.png")
        rows.append((f"{index}.png", f"p{index // 2}", f"{bright} {side}"))
    with (root / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


def test_towers_learn_captions_and_the_saved_clip_is_read_by_the_bottleneck(captions: Path, clip_folder: Path, tmp_path: Path) -> None:
    report = train_localizer(captions, checkpoint=clip_folder, out=tmp_path / "towers", device="cpu", progress=False,
                             settings=TrainSettings(epochs=8, batch_size=8, lr=1e-3, workers=0))
    losses = [row["val_loss"] for row in report.history]
    assert report.kind == "towers" and report.best > 0 and losses[report.best] < losses[0] - 0.3
    localizer = mwm.create_localizer("bottleneck", checkpoint=tmp_path / "towers", device="cpu", layer=1)
    image = read_image(next(iter(read_list(captions))), ReadSettings())[None]
    one, other = localizer(image, ["dark left"]), localizer(image, ["bright right"])
    assert one.shape == (1, 64, 64) and (one - other).abs().max() > 1e-3


def test_long_captions_are_cut_and_counted(captions: Path, clip_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(captions, tmp_path / "long")
    text = (tmp_path / "long" / "index.csv").read_text().replace("dark left", "dark left and much more than the model reads")
    (tmp_path / "long" / "index.csv").write_text(text)
    with pytest.warns(UserWarning, match="9 captions are longer than the 24 tokens"):
        train_localizer(tmp_path / "long", checkpoint=clip_folder, out=tmp_path / "out", device="cpu", progress=False, settings=TrainSettings(epochs=1, batch_size=8, workers=0))


def test_patients_are_never_on_both_sides_and_test_rows_are_not_read(captions: Path, tmp_path: Path) -> None:
    found = list_examples(captions, masks=None, caption=True, val_share=0.3)
    assert not {r.patient for r in found.train} & {r.patient for r in found.val} and len(found.train) + len(found.val) == 36
    shutil.copytree(captions, tmp_path / "split")
    rows = list(csv.DictReader((captions / "index.csv").read_text().splitlines()))
    with (tmp_path / "split" / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "caption", "split"), *((row["file"], row["caption"], ("train", "val", "test")[i % 3]) for i, row in enumerate(rows))])
    found = list_examples(tmp_path / "split", masks=None, caption=True)
    assert {r.split for r in found.train} == {"train"} and {r.split for r in found.val} == {"val"}


def _refusal(*arguments: object, **options: object) -> str:
    with pytest.raises(ValueError) as caught:
        train_localizer(*arguments, device="cpu", progress=False, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_trained_ends_in_one_sentence(scans: Path, captions: Path, clipseg_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    images, masks, out = scans / "images", scans / "masks", tmp_path / "out"
    assert "prompts must be given" in _refusal(images, masks, clipseg_folder, out)
    assert "at most 24 tokens" in _refusal(images, masks, clipseg_folder, out, prompts=["a prompt that is longer than this"], absent=["cat"])
    assert "masks must be left out" in _refusal(captions, masks, clip_folder, out)
    assert "column caption" in _refusal(images, None, clip_folder, out)
    assert "must have masks" in _refusal(images, None, clipseg_folder, out, prompts=["x"])
    assert "open_clip" in _refusal(images, masks, "biomedclip", out)
    assert "out must be a new folder" in _refusal(images, masks, clipseg_folder, scans, prompts=["x"])
    assert "local folder or a hub name" in _refusal(images, masks, tmp_path / "nowhere", out, prompts=["x"])
    assert not out.exists()
    for setting in ({"epochs": 0}, {"lr": 0.0}, {"absent_share": 1.0}, {"val_share": 0}, {"batch_size": 2.5}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            TrainSettings(**setting)


def test_training_under_torchrun_is_refused(scans: Path, clipseg_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in _refusal(scans / "images", scans / "masks", clipseg_folder, tmp_path / "out", prompts=["x"])


def test_training_that_diverges_stops_with_a_sentence_and_leaves_no_folder(scans: Path, clipseg_folder: Path, tmp_path: Path) -> None:
    said = _refusal(scans / "images", scans / "masks", clipseg_folder, tmp_path / "out", prompts=["x"], absent=["y"], settings=TrainSettings(epochs=6, lr=1e30, workers=0))
    assert "Lower --lr" in said and list(tmp_path.iterdir()) == []


def test_command_line_trains_from_a_csv_with_masks(scans: Path, clipseg_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import argparse

    from mwm.cli import localize_train

    with (scans / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "mask"), *((f"images/{i}.png", f"masks/{i}.png") for i in range(6))])
    parser = argparse.ArgumentParser()
    localize_train.add_arguments(parser)
    words = [str(scans / "index.csv"), "--prompt", "a square", "--absent", "cat", "--checkpoint", str(clipseg_folder), "--out", str(tmp_path / "out")]
    words += ["--epochs", "1", "--device", "cpu"]
    assert localize_train.run(parser.parse_args(words), words) == 0
    assert "trained: head, 5 images, 1 to validate" in capsys.readouterr().out and (tmp_path / "out" / "model.safetensors").is_file()
    assert mask_store(None).has(next(iter(read_list(scans / "index.csv"))))
