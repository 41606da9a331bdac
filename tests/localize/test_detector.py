"""The detector localizer, on small random Grounding DINO, OWLv2 and OWL-ViT checkpoints loaded through the public call."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mwm
from mwm.data import open_regions, read_list
from mwm.localize import localize_folder
from mwm.localize.detector import paint_boxes

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def grounding_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import (
        BertConfig,
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    folder = tmp_path_factory.mktemp("grounding")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *LETTERS, *("##" + letter for letter in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.manual_seed(3)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_indices=[2, 3, 4]),
        text_config=BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=32),
        num_queries=12, num_feature_levels=3, d_model=32, max_text_len=32, disable_custom_kernels=True,
        encoder_layers=1, encoder_ffn_dim=16, encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=16, decoder_attention_heads=2)
    model = GroundingDinoForObjectDetection(config)
    with torch.no_grad():  # scores around one half, boxes of all sizes
        for name, parameter in model.named_parameters():
            parameter.mul_(0.25 if name.startswith("model.text_projection") else 3 if "bbox_embed" in name else 1)
    model.save_pretrained(folder)
    images = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    GroundingDinoProcessor(images, BertTokenizer(str(folder / "vocab.txt"), model_max_length=32)).save_pretrained(folder)
    return folder


def _owl_folder(folder: Path, version: str) -> Path:
    import transformers

    letters = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16, pad_token="<|endoftext|>")
    width = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = getattr(transformers, f"{version}Config")(
        text_config={**width, "vocab_size": len(letters), "max_position_embeddings": 16, "bos_token_id": len(letters) - 2, "eos_token_id": len(letters) - 1, "pad_token_id": 0},
        vision_config={**width, "image_size": 64, "patch_size": 16}, projection_dim=32)
    torch.manual_seed(5)
    model = getattr(transformers, f"{version}ForObjectDetection")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # boxes near their places, scores that differ
            parameter.mul_(0.02 if name.startswith("box_head") else 2 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    size = {"height": 64, "width": 64}
    images = transformers.Owlv2ImageProcessor(size=size) if version == "Owlv2" else transformers.OwlViTImageProcessor(size=size, crop_size=size)
    getattr(transformers, f"{version}Processor")(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def owlv2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _owl_folder(tmp_path_factory.mktemp("owlv2"), "Owlv2")


@pytest.fixture(scope="module")
def owlvit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _owl_folder(tmp_path_factory.mktemp("owlvit"), "OwlViT")


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


EVERY = pytest.mark.parametrize("folder", ["grounding_folder", "owlv2_folder", "owlvit_folder"], indirect=True)


def scans(batch: int = 2, channels: int = 1, height: int = 48, width: int = 80) -> torch.Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


@functools.cache
def detector(folder: Path, **settings: object) -> object:
    return mwm.create_localizer("detector", checkpoint=folder, device="cpu", **{"box_threshold": 0.0, "text_threshold": 0.0, "max_area": 1.0, **settings})


@EVERY
def test_region_has_the_size_of_the_image_and_lies_in_0_1(folder: Path) -> None:
    region = detector(folder)(scans(3), ["both lungs", "a tumour", "heart"])
    assert region.shape == (3, 48, 80) and region.dtype == torch.float32
    assert region.min() >= 0 and region.max() <= 1 and region.std() > 0


@EVERY
def test_boxes_and_scores_are_those_of_transformers_own_postprocessing(folder: Path) -> None:
    """8-bit images through the processor, network and post-processing of transformers, boxes cut to the image."""
    found = detector(folder)
    pixels = (scans(1)[0, 0] * 255).round().to(torch.uint8).numpy()
    text = ["both lungs."] if found.grounding else [["both lungs"]]
    inputs = found.processor(images=[Image.fromarray(pixels).convert("RGB")], text=text, return_tensors="pt")
    with torch.no_grad():
        output = found.model(**inputs)
    settings = {"threshold": 0.0, "target_sizes": [(48, 80)]} | ({"input_ids": inputs["input_ids"], "text_threshold": 0.0} if found.grounding else {})
    theirs = found.processor.post_process_grounded_object_detection(output, **settings)[0]
    limits = torch.tensor([80.0, 48.0, 80.0, 48.0])
    cut = torch.minimum(theirs["boxes"].clamp(min=0), limits)
    order = theirs["scores"].argsort(descending=True, stable=True)
    keep = [i for i in order.tolist() if bool(((cut[i, 2:] - cut[i, :2]) >= 1).all())]
    boxes, scores = found.boxes(torch.from_numpy(pixels)[None, None].float() / 255, ["both lungs"])[0]
    assert len(keep) >= 1 and torch.allclose(boxes, cut[keep], atol=1e-3) and torch.allclose(scores, theirs["scores"][keep], atol=1e-5)


@EVERY
def test_batch_and_padding_do_not_change_a_map(folder: Path) -> None:
    images, prompts = scans(3), ["lungs", "a longer text", "b"]
    together = detector(folder)(images, prompts)
    alone = torch.cat([detector(folder)(images[i : i + 1], prompts[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-4)


@EVERY
def test_one_grey_value_a_high_threshold_and_boxes_of_the_whole_image_give_empty_maps(folder: Path) -> None:
    found = detector(folder)
    assert found(torch.full((1, 1, 48, 80), 0.4), ["lungs"]).max() == 0 and found(scans(1), ["lungs"]).max() > 0
    assert detector(folder, box_threshold=1.0)(scans(1), ["lungs"]).max() == 0
    assert detector(folder, max_area=0.0)(scans(1), ["lungs"]).max() == 0


@EVERY
def test_prompt_too_long_is_refused_with_both_numbers(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"at most (16|32) tokens, got \d\d in"):
        detector(folder)(scans(1), ["left and right lungs of a grown person"])


def test_text_threshold_and_text_matter_to_grounding_dino(grounding_folder: Path) -> None:
    scores = detector(grounding_folder).boxes(scans(1), ["lungs"])[0][1]
    cut = float(scores.median())
    assert len(detector(grounding_folder, text_threshold=cut).boxes(scans(1), ["lungs"])[0][1]) == int((scores > cut).sum())
    lungs, heart = detector(grounding_folder)(scans(1).repeat(2, 1, 1, 1), ["lungs", "heart"])
    assert (lungs - heart).abs().max() > 1e-4
    assert torch.equal(detector(grounding_folder)(scans(1), ["Lungs "]), detector(grounding_folder)(scans(1), ["lungs."]))


def test_painted_box_is_its_score_inside_half_on_the_edge_and_nothing_outside() -> None:
    painted = paint_boxes(torch.tensor([[10.0, 20.0, 30.0, 60.0]]), torch.tensor([0.6]), (80, 40), soft_edge=0.2, relative=False)
    assert painted[40, 20] == pytest.approx(0.6) and painted[:, :7].max() == 0 and painted[:16].max() == 0
    assert painted[40, 9] == pytest.approx(0.6 * (0.5 - 0.5 / 4)) and painted[40, 10] == pytest.approx(0.6 * (0.5 + 0.5 / 4))
    assert paint_boxes(torch.tensor([[10.0, 20.0, 30.0, 60.0]]), torch.tensor([0.6]), (80, 40), relative=True).max() == pytest.approx(1)


def test_painted_boxes_equal_a_brute_force_maximum() -> None:
    place = torch.Generator().manual_seed(0)
    corner, extent = torch.rand(5, 2, generator=place) * 20, torch.rand(5, 2, generator=place) * 20 + 1
    boxes, scores = torch.cat([corner, corner + extent], 1), torch.rand(5, generator=place)
    painted = paint_boxes(boxes, scores, (32, 40), soft_edge=0.3, relative=False)
    for y, x in [(0, 0), (5, 7), (13, 22), (20, 11), (31, 39), (18, 18)]:
        best = 0.0
        for (left, top, right, bottom), score in zip(boxes.tolist(), scores.tolist(), strict=True):
            across = min(max(min(x + 0.5 - left, right - x - 0.5) / (0.3 * (right - left)) + 0.5, 0), 1)
            down = min(max(min(y + 0.5 - top, bottom - y - 0.5) / (0.3 * (bottom - top)) + 0.5, 0), 1)
            best = max(best, score * across * down)
        assert painted[y, x] == pytest.approx(best, abs=1e-5)


def test_hard_edges_and_no_box() -> None:
    hard = paint_boxes(torch.tensor([[2.0, 3.0, 6.0, 9.0]]), torch.tensor([0.5]), (12, 10), soft_edge=0.0)
    assert set(hard.unique().tolist()) == {0.0, 1.0} and hard.sum() == 24
    assert paint_boxes(torch.zeros(0, 4), torch.zeros(0), (5, 6)).sum() == 0


def test_folder_of_images_goes_through_the_detector(owlv2_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    for index in range(3):
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (48, 64), dtype=np.uint8)).save(tmp_path / "scans" / f"{index}.png")
    report = localize_folder(tmp_path / "scans", "heart", detector(owlv2_folder), tmp_path / "regions", progress=False)
    assert report.images == 3 and all(open_regions(tmp_path / "regions").has(record) for record in read_list(tmp_path / "scans"))


def _refusal(**arguments: object) -> str:
    with pytest.raises(ValueError) as caught:
        mwm.create_localizer("detector", device="cpu", **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_checkpoints_of_another_kind_or_without_weights_end_in_one_sentence(owlv2_folder: Path, clipseg_folder: Path, tmp_path: Path) -> None:
    assert "grounding-dino-tiny" in _refusal()
    assert "of type 'clipseg'" in _refusal(checkpoint=clipseg_folder)
    assert "which is for sam" in _refusal(checkpoint="medsam")
    assert "local folder or a hub name" in _refusal(checkpoint=tmp_path / "nowhere")
    bare = shutil.copytree(owlv2_folder, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    assert "safetensors" in _refusal(checkpoint=bare)
    (bare / "model.safetensors").write_bytes(b"no weights")
    assert "cannot be read" in _refusal(checkpoint=bare)
    other = shutil.copytree(owlv2_folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (other / "config.json").write_text(json.dumps(config))
    assert "all weights" in _refusal(checkpoint=other)


def test_weights_in_a_pickle_are_not_read(owlv2_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    other = shutil.copytree(owlv2_folder, tmp_path / "pickled")
    torch.save(load_file(str(other / "model.safetensors")), other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    assert "safetensors" in _refusal(checkpoint=other)


@pytest.mark.parametrize("setting", [{"box_threshold": 1.5}, {"text_threshold": -0.1}, {"soft_edge": 2}, {"max_area": float("nan")}, {"batch_size": 0}])
def test_settings_out_of_range_are_refused_before_anything_is_read(setting: dict, tmp_path: Path) -> None:
    assert next(iter(setting)) in _refusal(checkpoint=tmp_path / "nowhere", **setting)


def test_fingerprint_follows_weights_and_settings(owlv2_folder: Path, grounding_folder: Path) -> None:
    marks = {detector(owlv2_folder).fingerprint, detector(grounding_folder).fingerprint, detector(owlv2_folder, soft_edge=0.2).fingerprint}
    assert len(marks) == 3 and detector(owlv2_folder).fingerprint in marks


def test_missing_package_ends_in_one_sentence(owlv2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install -U transformers" in _refusal(checkpoint=owlv2_folder)
