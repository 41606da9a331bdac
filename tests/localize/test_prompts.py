"""Prompt sets and ensembles: what ships is whole and short enough, what is asked for is found or refused, maps are averaged and subtracted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mwm.data import demo_folder, read_image
from mwm.localize import UnsupportedImage, create_localizer
from mwm.localize.ensemble import EnsembleLocalizer, maps_of
from mwm.localize.prompt_sets import LEVELS, list_prompt_sets, load_prompt_set, parse_prompt_set, resolve_prompts


@pytest.fixture(scope="module")
def xray() -> Tensor:
    """A frontal chest X-ray that comes with the package. float32 [1, 1, H, W]"""
    return read_image(sorted((demo_folder() / "chest_xray").rglob("*.*g"))[0])[None]


class Letters:
    """Map of a prompt: its number of letters over 100 in the left half; the cosine is that number too."""

    name, fingerprint = "letters", "letters 1"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.asked += prompts
        self.similarity = torch.tensor([len(p) / 100 for p in prompts])
        maps = torch.zeros(len(images), *images.shape[2:])
        maps[:, :, : images.shape[3] // 2] = self.similarity.view(-1, 1, 1)
        return maps


@pytest.mark.parametrize("name", list_prompt_sets())
def test_shipped_sets_have_paraphrases_on_three_levels_that_name_their_target(name: str) -> None:
    found = load_prompt_set(name)
    assert tuple(found.levels) == LEVELS and found.absent and found.title
    for level, least in (("P1", 5), ("P2", 4), ("P3", 4)):
        assert len(set(found.sentences(level))) == len(found.sentences(level)) >= least
    assert all(found.levels["P3"]) and len(found.levels["P3"]) >= 2
    assert max(len(text.split()) for text in found.sentences("P1")) < max(len(text.split()) for text in found.sentences("P2"))
    for text in (*found.sentences("P1"), *found.sentences("P2")):
        assert any(word in text.lower() for word in found.words), text


def test_the_tasks_of_the_field_are_covered() -> None:
    assert {"brain_mri_tumour", "chest_ct_lungs", "chest_ct_infection", "chest_ct_nodule", "chest_xray_lungs", "chest_xray_opacity", "chest_xray_heart",
            "ultrasound_breast_lesion", "skin_lesion", "wound", "fundus_disc", "fundus_lesion"} <= set(list_prompt_sets())


@pytest.mark.parametrize("name", ["brain_mri_tumour", "chest_xray_lungs", "chest_ct_lungs"])
def test_short_prompts_are_in_the_shipped_localizers_vocabulary(name: str) -> None:
    tiny = create_localizer("tiny", device="cpu")
    image = torch.rand(1, 1, 64, 64)
    for text in load_prompt_set(name).sentences("P1"):
        try:
            tiny(image, [text])
        except ValueError as error:
            assert "images must be" in str(error), error  # the noise is refused, the words are not


def test_level_and_sub_type_are_chosen_behind_a_colon() -> None:
    found, texts = resolve_prompts("brain_mri_tumour:P3/glioma")
    assert texts == list(found.levels["P3"]["glioma"])
    assert resolve_prompts("brain_mri_tumour:P1")[1] == found.sentences("P1")
    assert resolve_prompts("brain_mri_tumour")[1] == found.sentences("P1") + found.sentences("P2")
    assert len(resolve_prompts("brain_mri_tumour:P3")[1]) == sum(map(len, found.levels["P3"].values()))


@pytest.mark.parametrize(("spec", "sentence"), [
    ("chest_xray_lung", "Did you mean chest_xray_lungs"),
    ("Brain-MRI tumor", "Did you mean brain_mri_tumour"),
    ("xray", "Did you mean chest_xray"),
    ("../../../etc/passwd", "set must be one of brain_mri_tumour"),
    ("chest_xray_lungs:P9", "level of chest_xray_lungs must be one of P1, P2, P3"),
    ("brain_mri_tumour:P3/none", "level of brain_mri_tumour must be one of"),
    ("gone.yaml", "file that is there"),
])
def test_unknown_set_or_level_is_one_sentence_with_the_near_one(spec: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        resolve_prompts(spec)


def test_own_set_is_read_from_a_file_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "liver.yaml"
    path.write_text("title: liver\nP1: [liver, the liver]\nP3: {cyst: [a cyst of the liver]}\n")
    assert resolve_prompts(f"{path}:P1")[1] == ["liver", "the liver"]
    assert resolve_prompts(str(path))[1] == ["liver", "the liver"] and load_prompt_set(path).sentences("P3/cyst") == ["a cyst of the liver"]
    for text, sentence in [("P1: [" + "word " * 41 + "]", "1 to 40 words"), ("P1: liver", "list of sentences"), ("title: x", "at least one of P1"), ("P1: [3]", "must be a text"),
                           ("- a", "got list"), ("P1: [a]\nrun: rm", "must hold title"), ("P1: [a]\ncomponents: 0", "components"), ("P1: {'../x': [a]}", "sub-types"),
                           ("!!python/object:os.system {}", "cannot be read"), ("P1: ['a\\u0007']\n".replace("'a", '"a').replace("7'", '7"'), "must be a text")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            load_prompt_set(path)
    path.write_bytes(b"P1: [" + b"a, " * 200000 + b"]")
    with pytest.raises(ValueError, match="KiB"):
        load_prompt_set(path)
    with pytest.raises(ValueError, match="at most 500"):
        parse_prompt_set("x", {"P1": [f"a {k}" for k in range(501)]})


def test_a_small_file_cannot_become_a_text_of_gigabytes(tmp_path: Path) -> None:
    import resource

    levels = ["&a0 [" + "lol, " * 10 + "]", *(f"&a{k} [" + f"*a{k - 1}, " * 10 + "]" for k in range(1, 9))]
    path = tmp_path / "bomb.yaml"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for text in (f"title: [{', '.join(levels)}]\nP1: [lung]\n", f"words: [{', '.join(levels)}]\nP1: [lung]\n", "P1: &x [lung]\nP2: *x\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="references"):
            load_prompt_set(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize(("text", "sentence"), [
    ("title: 2020-13-45\nP1: [lung]", "cannot be read"),  # a date that is none
    ("components: " + "9" * 6000 + "\nP1: [lung]", "cannot be read"),
    ("P1: [lung]\nP1: [heart]", "'P1' stands there twice"),
    ("P3: {a: [lung], a: [heart]}", "'a' stands there twice"),
    ("title: [1, 2]\nP1: [lung]", "title of set.yaml must be a text"),
    ("absent: {x: y}\nP1: [lung]", "absent of set.yaml must be a text"),
    ("absent: " + "cat " * 60 + "\nP1: [lung]", "absent of set.yaml must be a text of at most 40 words"),
    ("[" * 100_000, "cannot be read"),
])
def test_what_is_no_prompt_set_is_refused_by_the_name_of_its_file(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "set.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_prompt_set(path)
    assert str(caught.value).startswith("prompts: ") and "\n" not in str(caught.value) and "set.yaml" in str(caught.value)


def test_ensemble_is_the_mean_of_maps_and_negatives_are_subtracted() -> None:
    inner, images = Letters(), torch.rand(3, 1, 8, 8)
    mean = EnsembleLocalizer(inner, ["a" * 20, "b" * 60])
    heat = mean(images, ["set"] * 3)
    assert torch.allclose(heat[:, :, :4], torch.tensor(0.4)) and not heat[:, :, 4:].any() and "set" not in inner.asked
    assert torch.allclose(mean.similarity, torch.full((3,), 0.4))
    less = EnsembleLocalizer(inner, ["a" * 60], ["b" * 20, "c" * 40], weight=0.5)(images, ["x"] * 3)
    assert torch.allclose(less[:, :, :4], torch.tensor(0.6 - 0.5 * 0.3))
    own = EnsembleLocalizer(inner, negatives=["b" * 10])(images, ["x" * 30, "x" * 50, "x" * 5])
    assert torch.allclose(own[:, 0, 0], torch.tensor([0.2, 0.4, 0.0]))  # never below 0
    assert EnsembleLocalizer(inner, ["a"]).fingerprint != EnsembleLocalizer(inner, ["b"]).fingerprint != inner.fingerprint
    assert EnsembleLocalizer(inner, negatives=["a"]).fingerprint != EnsembleLocalizer(inner, ["a"]).fingerprint
    assert mean(images[:0], []).shape == (0, 8, 8)


def test_refused_negative_prompt_subtracts_nothing_and_a_refused_prompt_stays_refused() -> None:
    class Picky(Letters):
        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            if "z" in prompts[0] and bool((images.amax((1, 2, 3)) > 0.5).any()):
                raise UnsupportedImage("picky: not alike")
            return super().__call__(images, prompts)

    images = torch.cat([torch.full((1, 1, 8, 8), 0.2), torch.full((1, 1, 8, 8), 0.9)])
    less = EnsembleLocalizer(Picky(), ["a" * 60], ["z" * 20])(images, ["x"] * 2)
    assert torch.allclose(less[:, 0, 0], torch.tensor([0.4, 0.6]))
    with pytest.raises(UnsupportedImage):
        EnsembleLocalizer(Picky(), ["z"], ["a"])(images, ["x"] * 2)


def test_localizer_that_reads_many_prompts_at_once_is_asked_at_once() -> None:
    class Many(Letters):
        calls = 0

        def many(self, images: Tensor, prompts: list[str]) -> Tensor:
            Many.calls += 1
            maps = torch.stack([Letters.__call__(self, images, [p] * len(images)) for p in prompts])
            self.similarity = torch.tensor([[len(p) / 100] * len(images) for p in prompts])
            return maps

    images, texts = torch.rand(2, 1, 8, 8), ["a" * 10, "b" * 30]
    fast, slow = maps_of(Many(), images, texts), maps_of(Letters(), images, texts)
    assert Many.calls == 1 and torch.equal(fast[0], slow[0]) and torch.equal(fast[1], slow[1])


def test_subtracting_the_left_lung_leaves_the_right_one(xray: Tensor) -> None:
    tiny = create_localizer("tiny", device="cpu")
    right = EnsembleLocalizer(tiny, negatives=["left lung"])(xray, ["both lungs"])[0]
    half = right.shape[1] // 2
    assert right[:, :half].sum() > 5 * right[:, half:].sum() > 0  # the patient's right lung is at image left


@pytest.mark.parametrize(("arguments", "sentence"), [
    ({}, "prompts or negatives must be given"), ({"prompts": [" "]}, "must be texts"), ({"negatives": ["a"], "weight": 0}, "weight must be in"),
])
def test_bad_ensembles_are_refused(arguments: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        EnsembleLocalizer(Letters(), **arguments)
    with pytest.raises(ValueError, match="must read prompts, got edges"):
        EnsembleLocalizer(create_localizer("edges", device="cpu"), ["x"])
