"""CLIP-like models of two libraries behind one face, loaded from disk through the public call."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.localize.clip_folders import DEPTH, KINDS, SIZE, make

import mwm
from mwm.localize.tower import Tower
from mwm.localize.towers import load_tower

PROMPT = "both lungs"
needs_open_clip = pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed")
ALL = [pytest.param(kind, marks=needs_open_clip if kind.startswith("open") else ()) for kind in KINDS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    root, made = tmp_path_factory.mktemp("clips"), {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = make(kind, root / kind)
        return made[kind]

    return folder


@pytest.fixture(scope="module")
def towers(folders):
    made: dict[str, Tower] = {}

    def tower(kind: str) -> Tower:
        if kind not in made:
            made[kind] = load_tower(folders(kind), "cpu")
        return made[kind]

    return tower


@pytest.mark.parametrize("kind", ALL)
def test_cut_anywhere_the_pieces_give_the_librarys_own_embedding(towers, kind: str) -> None:
    tower = towers(kind)
    pixels = torch.randn(2, 3, *tower.size, generator=torch.Generator().manual_seed(1))
    expected = tower.whole(pixels)
    for layer in range(tower.depth):
        for prepared in (False, True):
            ours = tower.suffix(layer, prepared=prepared)(tower.prefix(pixels, layer))
            assert torch.allclose(ours, expected, atol=1e-5 * float(expected.abs().max())), (layer, prepared)


@pytest.mark.parametrize("kind", ALL)
def test_gradients_of_the_pieces_are_those_of_the_library(towers, kind: str) -> None:
    """A hook on the library's own block against the cut: derivative of the embedding's sum in that block's output."""
    tower = towers(kind)
    pixels = torch.randn(1, 3, *tower.size, generator=torch.Generator().manual_seed(2))
    layer = 1
    h = tower.prefix(pixels, layer).requires_grad_()
    plain = h
    for block in tower.blocks[layer + 1 :]:
        plain = block(plain)
    (expected,) = torch.autograd.grad(tower.tail(plain).pow(2).sum(), h)
    for prepared in (False, True):
        (ours,) = torch.autograd.grad(tower.suffix(layer, prepared=prepared)(h).pow(2).sum(), h)
        assert torch.allclose(ours, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ALL)
def test_text_embedding_is_the_librarys_and_wordings_are_averaged(towers, kind: str) -> None:
    tower = towers(kind)
    one, other = (F.normalize(tower.encode([text])[0], dim=0) for text in ("both lungs", "a brain tumour"))
    assert torch.allclose(tower.text(["both lungs"])[0], one, atol=1e-5)
    assert torch.allclose(tower.text(["both lungs | a brain tumour"])[0], F.normalize(one + other, dim=0), atol=1e-5)
    together = tower.encode(["both lungs", "the left lung in the chest"])
    assert torch.allclose(together[0], tower.encode(["both lungs"])[0], atol=1e-4)


@pytest.mark.parametrize("kind", ALL)
def test_a_prompt_longer_than_the_text_tower_reads_is_refused_with_both_numbers(towers, kind: str) -> None:
    with pytest.raises(ValueError, match=r"prompt must have at most 12 tokens, got \d+"):
        towers(kind).text(["lung " * 20])
    with pytest.raises(ValueError, match="wordings between bars must not be empty"):
        towers(kind).text(["lung | "])


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("name", ["bottleneck", "gradcam", "gscorecam"])
def test_every_kind_runs_through_the_public_call(folders, kind: str, name: str) -> None:
    fast = {"setting": "fast"} if name == "bottleneck" else {}
    localizer = mwm.create_localizer(name, checkpoint=folders(kind), device="cpu", **fast)
    images = torch.rand(2, 1, 40, 56, generator=torch.Generator().manual_seed(3))
    maps = localizer(images, [PROMPT, "a brain tumour"])
    assert maps.shape == (2, 40, 56) and maps.dtype == torch.float32
    assert maps.min() >= 0 and maps.max() <= 1 and localizer.similarity.shape == (2,)
    if name == "bottleneck":
        assert torch.equal(maps.amax((1, 2)), torch.ones(2)) and torch.equal(maps.amin((1, 2)), torch.zeros(2))


def test_preprocessing_is_the_checkpoints_own(towers, folders) -> None:
    import numpy as np
    from PIL import Image
    from transformers import CLIPImageProcessor

    grey = (torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(4)) * 255).to(torch.uint8)
    theirs = CLIPImageProcessor.from_pretrained(folders("clip"))(images=[Image.fromarray(np.stack([grey.numpy()] * 3, 2))], return_tensors="pt")["pixel_values"]
    assert torch.allclose(towers("clip").preprocess(grey[None, None].float() / 255), theirs, atol=1e-5)


def edited(folder: Path, target: Path, **changes: object) -> Path:
    """A copy of a checkpoint with other values in its config.json."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_what_is_no_clip_like_model_is_refused_in_one_sentence(folders, clipseg_folder: Path, tmp_path: Path) -> None:
    clip = folders("clip")
    nameless = tmp_path / "empty"
    nameless.mkdir()
    pickled = shutil.copytree(clip, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"not read")
    broken = shutil.copytree(clip, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"xx")
    own_code = edited(clip, tmp_path / "code", model_type="biomedclip", auto_map={"AutoModel": "modeling.Model"})
    deeper = edited(clip, tmp_path / "deeper", vision_config={**json.loads((clip / "config.json").read_text())["vision_config"], "num_hidden_layers": DEPTH + 1})
    for checkpoint, words in ((clipseg_folder, "type 'clipseg'"), (nameless, "without one"), (pickled, "safetensors"), (broken, "cannot be read"), (own_code, "trust_remote_code"),
                              (deeper, "all weights"), ("no/such folder", "hub name owner/model"), (tmp_path / "nowhere", "hub name owner/model")):
        with pytest.raises(ValueError, match=words) as caught:
            load_tower(checkpoint, "cpu")
        assert "\n" not in str(caught.value) and str(caught.value).startswith("bottleneck: "), caught.value


@needs_open_clip
def test_open_clip_folders_that_cannot_be_read_are_refused_in_one_sentence(folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = shutil.copytree(folders("open-clip"), tmp_path / "bare")
    (bare / "open_clip_model.safetensors").unlink()
    for words in ("without", "cannot be read by open_clip"):
        with pytest.raises(ValueError, match=words) as caught:
            load_tower(bare, "cpu")
        assert "\n" not in str(caught.value)
        (bare / "open_clip_model.safetensors").write_bytes(b"xx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"is a model of open_clip, which is not installed. pip install 'mwm\[openclip\]'"):
        load_tower(folders("open-clip"), "cpu")


def test_a_tower_with_parts_that_are_not_known_is_refused(towers, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    tower = towers("clip")
    wrong = dataclasses.replace(tower, blocks=[*tower.blocks[:-1], dataclasses.replace(tower.blocks[-1], heads=2)])
    with pytest.raises(ValueError, match="do not add up to its own embedding"):
        wrong.check("bottleneck")


def test_fingerprint_follows_the_weights(folders, towers, tmp_path: Path) -> None:
    same = shutil.copytree(folders("clip"), tmp_path / "copy")
    assert load_tower(same, "cpu").fingerprint == towers("clip").fingerprint
    weights = bytearray((same / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (same / "model.safetensors").write_bytes(weights)
    assert load_tower(same, "cpu").fingerprint != towers("clip").fingerprint
