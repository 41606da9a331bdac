"""The tiny localizer follows the text, knows left from right, finds nothing where nothing is, and refuses what it does not know."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mwm.localize import create_localizer
from mwm.localize.tiny import WEIGHTS, TinyLocalizer
from mwm.localize.tiny_text import STRUCTURES, TOKENS, encode_prompt, parse_prompt, words_of
from mwm.localize.tiny_words import ALIASES, CONCEPTS, FILLERS

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "tiny"


@pytest.fixture(scope="module")
def tiny() -> TinyLocalizer:
    return create_localizer("tiny", device="cpu")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    for name in ("prompts", "augment", "prepare", "pseudo_masks"):
        sys.modules.pop(name, None)


def scans(root: Path, dataset: str, count: int, split: str = "test") -> list[tuple[Tensor, dict[str, str]]]:
    """Evenly spread scans of a split with their rows. float32 [1, 1, H, W] each"""
    with (root / dataset / "index.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] == split and (row["mask"] or dataset == "chest_ct")]
    rows = rows[:: max(1, len(rows) // count)][:count]
    return [(torch.from_numpy(np.asarray(Image.open(root / dataset / row["file"]).convert("L"), np.float32) / 255)[None, None], row) for row in rows]


def mask_of(root: Path, dataset: str, row: dict[str, str]) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(root / dataset / row["mask"]).convert("L")) > 127)


def dice(found: Tensor, truth: Tensor) -> float:
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))


@pytest.mark.parametrize(("prompt", "structure"), [
    ("brain tumour", "brain_tumour"), ("Brain Tumor", "brain_tumour"), ("tumour", "brain_tumour"),
    ("an MRI slice highlighting the brain tumour in this patient", "brain_tumour"), ("lesion in the brain", "brain_tumour"),
    ("glioma", "glioma"), ("a meningioma on T1-weighted MRI", "meningioma"), ("pituitary adenoma", "pituitary_tumour"),
    ("both lungs", "lungs"), ("lungs of a healthy child on a chest X-ray", "lungs"), ("left lung and right lung", "lungs"),
    ("left lung", "left_lung"), ("the lung on the patient's left side", "left_lung"), ("right-sided lung", "right_lung"),
    ("RIGHT LUNG, chest CT", "right_lung"), ("brain cancer", "brain_tumour"), ("prolactinoma", "pituitary_tumour"), ("left pulmonary field", "left_lung"),
])
def test_prompt_is_understood_whatever_its_wording(prompt: str, structure: str) -> None:
    assert parse_prompt(prompt) == structure
    assert encode_prompt(prompt)


@pytest.mark.parametrize("prompt", [
    "sitting on a chair", "liver", "heart", "lungs and heart", "lung nodule", "lung tumour", "brain", "pituitary gland", "lesion", "no tumour",
    "normal brain without tumour", "left brain tumour", "glioma and meningioma", "everything", "the patient", "ventricles", "123", "左肺",
    "everything except the lungs", "pneumonia", "a photo of a cat", "mass in the lung", "lung cancer", "lungs и сердце", "brain metastasis",
])
def test_prompt_outside_the_vocabulary_is_refused_in_one_sentence_that_names_other_localizers(prompt: str, tiny: TinyLocalizer) -> None:
    with pytest.raises(ValueError, match="clipseg") as caught:
        tiny(torch.rand(1, 1, 64, 64), [prompt])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("tiny: ")


def test_vocabulary_lists_every_word_that_passes_the_gate(tiny: TinyLocalizer) -> None:
    listed = set(re.findall(r"[a-z0-9]+", " ".join(tiny.vocabulary())))
    assert set(TOKENS[1:]) <= listed
    assert set(ALIASES) <= listed
    assert set(FILLERS) <= listed


def test_every_word_with_a_meaning_is_read_as_one_that_training_used(scripts: None) -> None:
    import prompts

    trained = {word for structure in prompts.NOUNS for prompt in prompts.possible_training_prompts(structure) for word in words_of(prompt)}
    for words in [*CONCEPTS.values(), tuple(ALIASES)]:
        for word in words:
            assert set(words_of(word)) <= trained, word


def test_held_out_paraphrases_are_no_training_prompts_and_mean_their_structure(scripts: None) -> None:
    import prompts

    assert set(prompts.HELD_OUT) == set(STRUCTURES)
    for structure, sentences in prompts.HELD_OUT.items():
        trained = prompts.possible_training_prompts(structure)
        assert len(set(sentences)) >= 5
        assert not set(sentences) & trained
        assert all(parse_prompt(sentence) == structure for sentence in sentences)


def test_training_flips_swap_the_words_of_left_and_right(scripts: None) -> None:
    import augment
    from prepare import LEFT, RIGHT, SIDE

    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(400, SIDE, SIDE, dtype=torch.uint8)
    labels[:, 60:130, 30:80], labels[:, 60:130, 110:160] = RIGHT, LEFT
    images = torch.full((400, SIDE, SIDE), 40, dtype=torch.uint8)
    images[:, 60:130, 30:80] = 200  # the patient's right lung is the bright one
    views, maps = augment.augment(images, labels, torch.ones(400, dtype=torch.int64), generator)
    columns = torch.arange(maps.shape[-1])
    flipped = 0
    for view, label in zip(views, maps, strict=True):
        if (label == LEFT).sum() < 200 or (label == RIGHT).sum() < 200:
            continue
        centre = {side: float((columns * (label == side).sum(0)).sum() / (label == side).sum()) for side in (LEFT, RIGHT)}
        assert centre[LEFT] > centre[RIGHT]
        flipped += bool(view[0][label == LEFT].mean() > view[0][label == RIGHT].mean() + 0.1)
    assert 20 < flipped < 200


def test_two_lung_masks_are_split_with_the_patients_left_at_image_right(scripts: None) -> None:
    from prepare import LEFT, RIGHT, split_lungs

    mask = np.zeros((40, 60), bool)
    mask[5:30, 5:25], mask[8:34, 32:55] = True, True
    sides = split_lungs(mask)
    assert (sides[5:30, 5:25] == RIGHT).all()
    assert (sides[8:34, 32:55] == LEFT).all()


def test_only_cc_by_rows_are_trained_on(scripts: None) -> None:
    from prepare import may_be_used

    assert may_be_used("CC BY 4.0 (images) + CC BY 4.0 (masks)")
    assert may_be_used("CC BY 3.0 (image) + CC BY 4.0 (boxes, masks)")
    assert not may_be_used("CC BY-SA 4.0 (image) + CC BY 4.0 (masks)")
    assert not may_be_used("CC BY-NC-SA 4.0")
    assert not may_be_used("non-commercial only")


def test_pseudo_mask_finds_two_dark_lungs_in_a_drawn_chest_and_their_sides(scripts: None) -> None:
    import pseudo_masks

    y, x = np.mgrid[:256, :256]
    image = np.zeros((256, 256), np.uint8)
    image[((x - 128) / 105) ** 2 + ((y - 120) / 75) ** 2 < 1] = 120
    right, left = (((x - c) / 34) ** 2 + ((y - 118) / 46) ** 2 < 1 for c in (80, 176))
    image[right | left] = 0
    image[((x - 128) / 12) ** 2 + ((y - 160) / 12) ** 2 < 1] = 240
    mask, reason = pseudo_masks.lungs_of(image)
    assert reason == ""
    for side, truth in ((pseudo_masks.RIGHT, right), (pseudo_masks.LEFT, left)):
        found = mask == side
        assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.85


def test_weights_are_half_precision_and_small() -> None:
    from safetensors.torch import load_file

    assert WEIGHTS.stat().st_size <= 5_000_000
    assert {value.dtype for value in load_file(str(WEIGHTS)).values() if value.is_floating_point()} == {torch.float16}


def test_card_figures_are_those_of_the_shipped_weights(tiny: TinyLocalizer) -> None:
    metrics = json.loads((WEIGHTS.parent / "tiny_metrics.json").read_text())
    card = (WEIGHTS.parent / "tiny_card.md").read_text()
    assert metrics["fingerprint"] == tiny.fingerprint
    for name, row in metrics["dice"].items():
        assert f"| {name} | {row[0]:.3f} |" in card


@pytest.mark.parametrize("shape", [(1, 1, 224, 224), (2, 3, 100, 180), (1, 1, 300, 128), (1, 4, 33, 47)])
def test_map_has_the_size_of_the_image_whatever_its_channels(shape, tiny: TinyLocalizer, data_root: Path) -> None:
    image = scans(data_root, "chest_xray", 1)[0][0]
    resized = torch.nn.functional.interpolate(image, shape[2:], mode="bilinear", antialias=True).expand(shape)
    maps = tiny(resized, ["both lungs"] * shape[0])
    assert maps.shape == (shape[0], *shape[2:])
    assert maps.dtype == torch.float32
    assert 0 <= maps.min() <= maps.max() <= 1
    assert maps.max() > 0.9


def test_map_does_not_depend_on_the_batch_and_repeats_bit_for_bit(tiny: TinyLocalizer, data_root: Path) -> None:
    images = torch.cat([torch.nn.functional.interpolate(image, (224, 224)) for image, _ in scans(data_root, "chest_xray", 3)])
    prompts = ["left lung", "both lungs", "brain tumour"]
    together = tiny(images, prompts)
    assert torch.equal(together, tiny(images, prompts))
    assert all(torch.equal(together[k], tiny(images[k : k + 1], prompts[k : k + 1])[0]) for k in range(3))


def test_left_lung_is_at_image_right(tiny: TinyLocalizer, data_root: Path) -> None:
    for dataset in ("chest_xray", "chest_ct"):
        for image, _ in scans(data_root, dataset, 10):
            left, right = (tiny(image, [prompt])[0] >= 0.5 for prompt in ("left lung", "right lung"))
            if left.any() and right.any():
                columns = torch.arange(image.shape[-1], dtype=torch.float32)
                centre = [float((columns * m.sum(0)).sum() / m.sum()) for m in (left, right)]
                assert centre[0] > centre[1]
            assert (left & right).float().mean() < 0.02


def test_side_follows_the_picture_when_it_is_mirrored(tiny: TinyLocalizer, data_root: Path) -> None:
    for image, _ in scans(data_root, "chest_xray", 4):
        left = tiny(image.flip(3), ["left lung"])[0] >= 0.5
        assert left[:, image.shape[-1] // 2 :].sum() > 3 * left[:, : image.shape[-1] // 2].sum()


def test_lungs_and_tumours_of_test_scans_are_found(tiny: TinyLocalizer, data_root: Path) -> None:
    lungs = [dice(tiny(image, ["both lungs"])[0] >= 0.5, mask_of(data_root, "chest_xray", row)) for image, row in scans(data_root, "chest_xray", 15)]
    tumours = [dice(tiny(image, ["brain tumour"])[0] >= 0.5, mask_of(data_root, "brain_mri", row)) for image, row in scans(data_root, "brain_mri", 30)]
    assert np.mean(lungs) > 0.88
    assert np.mean(tumours) > 0.40


def test_prompt_for_other_anatomy_gives_an_almost_empty_map(tiny: TinyLocalizer, data_root: Path) -> None:
    for dataset, prompts in (("brain_mri", ["lungs", "left lung", "right lung"]), ("chest_xray", ["brain tumour", "glioma", "pituitary tumour"]),
                             ("chest_ct", ["brain tumour", "meningioma", "glioma"])):
        coverage = [float((tiny(image, [prompt]) >= 0.5).float().mean()) for image, _ in scans(data_root, dataset, 8) for prompt in prompts]
        assert np.mean(coverage) < 0.02


@pytest.mark.parametrize("change", ["darker", "gamma", "noise", "small", "inverted channels", "padded"])
def test_lungs_are_found_under_a_change_of_scanner(change: str, tiny: TinyLocalizer, data_root: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = []
    for image, row in scans(data_root, "chest_xray", 6):
        truth = mask_of(data_root, "chest_xray", row)
        if change == "darker":
            image = 0.1 + 0.4 * image
        elif change == "gamma":
            image = image**1.8
        elif change == "noise":
            image = (image + 0.05 * torch.randn(image.shape, generator=generator)).clamp(0, 1)
        elif change == "small":
            image = torch.nn.functional.interpolate(image, scale_factor=0.4, mode="bilinear", antialias=True)
            truth = torch.nn.functional.interpolate(truth[None, None].float(), image.shape[2:])[0, 0] > 0.5
        elif change == "inverted channels":
            image = image.expand(-1, 3, -1, -1).contiguous()
        else:
            image, truth = (torch.nn.functional.pad(v, (20, 20, 10, 10)) for v in (image, truth))
        scores.append(dice(tiny(image, ["lungs"])[0] >= 0.5, truth))
    assert np.mean(scores) > 0.85


def test_photograph_noise_and_colour_are_refused(tiny: TinyLocalizer) -> None:
    from sklearn.datasets import load_sample_image

    photo = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None].float() / 255
    flower = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None].float() / 255
    for image in (photo, flower, photo.mean(1, keepdim=True), torch.rand(1, 1, 128, 128)):
        with pytest.raises(ValueError, match="brain MRI, chest X-ray or chest CT"):
            tiny(image, ["lungs"])


def test_image_without_contrast_has_an_empty_map(tiny: TinyLocalizer) -> None:
    assert not tiny(torch.full((1, 1, 64, 64), 0.3), ["lungs"]).any()


def test_empty_batch_gives_no_maps(tiny: TinyLocalizer) -> None:
    assert tiny(torch.zeros(0, 1, 32, 32), []).shape == (0, 32, 32)
