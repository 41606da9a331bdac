"""The CLIPSeg localizer, on a small random checkpoint loaded through the public call."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import mwm


@pytest.fixture(scope="module")
def localizer(clipseg_folder: Path) -> object:
    return mwm.create_localizer("clipseg", checkpoint=clipseg_folder, device="cpu")


def scans(batch: int = 2, channels: int = 1, height: int = 48, width: int = 80) -> torch.Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def test_region_has_the_size_of_the_image_and_lies_in_0_1(localizer: object) -> None:
    region = localizer(scans(3), ["both lungs", "a tumour", "both lungs"])
    assert region.shape == (3, 48, 80) and region.dtype == torch.float32
    assert region.min() >= 0 and region.max() <= 1 and region.std() > 0


def test_map_equals_the_checkpoints_own_processor_and_model(localizer: object, clipseg_folder: Path) -> None:
    """8-bit images through transformers' processor, against [0, 1] images of one channel through ours."""
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

    gray = (scans(1, 1, 64, 64)[0, 0] * 255).to(torch.uint8).numpy()
    processor = CLIPSegProcessor.from_pretrained(clipseg_folder)
    model = CLIPSegForImageSegmentation.from_pretrained(clipseg_folder).eval()
    inputs = processor(text=["both lungs"], images=[Image.fromarray(np.stack([gray] * 3, 2))], return_tensors="pt")
    with torch.no_grad():
        expected = torch.sigmoid(model(**inputs).logits.reshape(1, 1, 64, 64))
    ours = localizer(torch.from_numpy(gray)[None, None].float() / 255, ["both lungs"])
    assert torch.allclose(localizer.preprocess(torch.from_numpy(gray)[None, None].float() / 255), inputs["pixel_values"], atol=1e-5)
    assert torch.allclose(ours, expected[0], atol=1e-5)


def test_resizing_agrees_with_the_checkpoints_own_processor(localizer: object, clipseg_folder: Path) -> None:
    from transformers import CLIPSegProcessor

    smooth = F.interpolate(scans(1, 1, 12, 20), (150, 250), mode="bicubic").clamp(0, 1)
    gray = (smooth[0, 0] * 255).round().to(torch.uint8)
    theirs = CLIPSegProcessor.from_pretrained(clipseg_folder)(images=[Image.fromarray(np.stack([gray.numpy()] * 3, 2))], return_tensors="pt")["pixel_values"]
    assert (localizer.preprocess(gray[None, None].float() / 255) - theirs).abs().max() < 2.5 / 255 / 0.224  # theirs rounds to 8 bits on the way


def test_text_changes_the_map(localizer: object) -> None:
    lungs, tumour = localizer(scans(1).repeat(2, 1, 1, 1), ["both lungs", "a brain tumour"])
    assert (lungs - tumour).abs().max() > 1e-4


def test_batch_and_padding_do_not_change_a_map(localizer: object) -> None:
    images, prompts = scans(3), ["lungs", "a much longer prompt", "b"]
    together = localizer(images, prompts)
    alone = torch.cat([localizer(images[i : i + 1], prompts[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_channels(localizer: object, channels: int) -> None:
    gray = scans(1)
    region = localizer(gray.expand(-1, channels, -1, -1), ["lungs"])
    assert torch.allclose(region, localizer(gray, ["lungs"]), atol=1e-5)


def test_empty_batch_gives_an_empty_answer(localizer: object) -> None:
    assert localizer(scans()[:0], []).shape == (0, 48, 80)


def test_fingerprint_follows_the_weights(localizer: object, clipseg_folder: Path, tmp_path: Path) -> None:
    same = shutil.copytree(clipseg_folder, tmp_path / "copy")
    assert mwm.create_localizer("clipseg", checkpoint=same, device="cpu").fingerprint == localizer.fingerprint
    weights = bytearray((same / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (same / "model.safetensors").write_bytes(weights)
    assert mwm.create_localizer("clipseg", checkpoint=str(same), device="cpu").fingerprint != localizer.fingerprint


def test_prompt_too_long_is_refused_with_both_numbers(localizer: object) -> None:
    with pytest.raises(ValueError, match="at most 24 tokens, got 43"):
        localizer(scans(1), ["lungs" * 8 + "x"])


@pytest.mark.parametrize(
    ("images", "prompts", "sentence"),
    [
        (scans(2), ["lungs"], "got 1 for 2 images"),
        (scans(2), "lungs", "list of texts"),
        (scans(1), [" "], "must not be empty"),
        (scans(1)[0], ["lungs"], r"\[B, C, H, W\]"),
        (scans(1) * 255, ["lungs"], r"must be in \[0, 1\]"),
        (scans(1) - 0.5, ["lungs"], r"must be in \[0, 1\]"),
        (scans(1) / 0 * 0, ["lungs"], r"must be in \[0, 1\]"),
        ((scans(1) * 255).to(torch.uint8), ["lungs"], "Divide 8-bit images"),
    ],
)
def test_bad_arguments_end_in_one_sentence(localizer: object, images: torch.Tensor, prompts: list[str], sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence):
        localizer(images, prompts)


def _refusal(**arguments: object) -> str:
    with pytest.raises(ValueError) as caught:
        mwm.create_localizer("clipseg", device="cpu", **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_checkpoint_must_be_given_and_must_exist(tmp_path: Path) -> None:
    assert "checkpoint must be given for clipseg" in _refusal()
    assert "local folder or a hub name" in _refusal(checkpoint=tmp_path / "nowhere")
    assert "without one" in _refusal(checkpoint=tmp_path)


def test_checkpoint_of_another_model_is_refused_by_its_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "of type 'bert'" in _refusal(checkpoint=tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "Download or save it again" in _refusal(checkpoint=tmp_path) or "config.json" in _refusal(checkpoint=tmp_path)


def test_checkpoint_without_weights_or_with_broken_weights_is_refused(clipseg_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clipseg_folder, tmp_path / "copy")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:2000])
    assert "cannot be read" in _refusal(checkpoint=folder)
    (folder / "model.safetensors").unlink()
    assert "without some of them" in _refusal(checkpoint=folder)


def test_checkpoint_whose_decoder_is_missing_is_refused(clipseg_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(clipseg_folder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in weights.items() if not key.startswith("decoder.")}, folder / "model.safetensors", {"format": "pt"})
    assert "has no decoder" in _refusal(checkpoint=folder)


class _Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_never_run(clipseg_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clipseg_folder, tmp_path / "copy")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            stored = json.loads((folder / name).read_text())
            stored["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor"), "evil.Model")
            (folder / name).write_text(json.dumps(stored))
    mwm.create_localizer("clipseg", checkpoint=folder, device="cpu")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": _Touch(tmp_path / "ran")}, folder / "pytorch_model.bin")
    assert "cannot be read" in _refusal(checkpoint=folder)
    assert not (tmp_path / "ran").exists()


def test_hub_name_that_cannot_be_fetched_ends_in_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert "neither a local folder nor could it be fetched" in _refusal(checkpoint="nobody-here/no-such-clipseg", offline=True)


def test_unknown_names_and_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clipseg, detector, .*tiny, got 'sam'"):
        mwm.create_localizer("sam")
    with pytest.raises(TypeError, match="settings of clipseg must be among batch_size, offline, revision, got sigma"):
        mwm.create_localizer("clipseg", checkpoint="a/b", sigma=1)


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "*")
    began = time.monotonic()
    assert "neither a local folder nor could it be fetched" in _refusal(checkpoint="nobody-here/no-such-clipseg")
    assert time.monotonic() - began < 15, "the hub's client retries for half a minute"
