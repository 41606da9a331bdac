"""The check finds out, without labels, whether maps follow the text: localizers that do, that do not, and that only seem to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.localize.clip_folders import louder, make
from torch import Tensor

from mwm.cli import main
from mwm.data import demo_folder, read_list
from mwm.localize import create_localizer, run_localize
from mwm.localize.check import Contrast, check_localizer, judge, may_ignore_text, random_letters
from mwm.localize.check_limits import CheckLimits
from mwm.localize.ensemble import EnsembleLocalizer
from mwm.localize.map_figures import centre_prior, correlation, mass_shift


def spot(images: Tensor, row: float, column: float, height: float = 1.0) -> Tensor:
    """A blob at a place, as shares of the image. [B, H, W]"""
    rows, columns = torch.linspace(0, 1, images.shape[2]), torch.linspace(0, 1, images.shape[3])
    blob = height * torch.exp(-((rows[:, None] - row) ** 2 + (columns[None] - column) ** 2) / 0.02)
    return blob.expand(len(images), -1, -1).clone()


class Fake:
    """A localizer of one behaviour."""

    name, fingerprint = "fake", "fake 1"

    def __init__(self, behaviour: str) -> None:
        self.behaviour = behaviour
        if behaviour == "noise":
            self.seed = 0

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        lung = "lung" in prompts[0]
        if self.behaviour == "follows":
            return spot(images, 0.2, 0.2) if lung else spot(images, 0.8, 0.7)
        if self.behaviour == "vague":  # every text moves it, whatever it says
            return spot(images, 0.2 + len(prompts[0]) % 7 / 10, 0.5)
        if self.behaviour == "fickle":  # what is absent is far off, but other words for the same are elsewhere, too
            return spot(images, 0.2, 0.2 if prompts[0] == "both lungs" else 0.4) if lung else torch.zeros_like(spot(images, 0, 0))
        if self.behaviour == "fainter":
            return spot(images, 0.2, 0.2, 0.9 if lung else 0.2)
        if self.behaviour == "blind":
            return spot(images, 0.2, 0.2) + 0.01 * len(prompts[0]) / 100
        if self.behaviour == "middle":
            return centre_prior(*images.shape[2:]).expand(len(images), -1, -1) * (1.0 if lung else 0.3)
        if self.behaviour == "flat":
            return torch.full((len(images), *images.shape[2:]), 0.6) + 0.001 * torch.rand(images.shape[2:], generator=torch.Generator().manual_seed(len(prompts[0])))
        if self.behaviour == "silent":
            return spot(images, 0.2, 0.2, 0.01) if lung else spot(images, 0.8, 0.7, 0.01)
        if self.behaviour == "broken":
            return torch.full((len(images), *images.shape[2:]), float("nan"))
        generator = torch.Generator().manual_seed(1000 * self.seed + len(prompts[0]))  # noise
        return torch.rand((len(images), *images.shape[2:]), generator=generator)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    (tmp_path / "scans").mkdir()
    for index in range(5):
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (40, 32 + 8 * (index % 2)), dtype=np.uint8)).save(tmp_path / "scans" / f"{index}.png")
    return tmp_path / "scans"


@pytest.mark.parametrize(("behaviour", "verdict", "reason"), [
    ("follows", "pass", None), ("fainter", "pass", None), ("blind", "fail", "is the same"), ("flat", "fail", "is the same"),
    ("silent", "fail", "show nothing"), ("vague", "fail", "no more than that of the prompt in other words"), ("fickle", "weak", "in other words gives another map"),
    ("noise", "fail", "differs no more than two seeds do"), ("middle", "weak", "middle of the image"),
])
def test_verdict_fits_the_behaviour(scans: Path, behaviour: str, verdict: str, reason: str | None) -> None:
    report = check_localizer(Fake(behaviour), list(read_list(scans)), "both lungs", progress=False)
    assert report.verdict == verdict, str(report)
    assert reason is None or reason in "; ".join(report.reasons)
    assert report.images == 5 and len(report.shown) == 5 and f"verdict: {verdict}" in str(report)
    kinds = [contrast.kind for contrast in report.contrasts]
    assert kinds == ["neutral", "absent", "random", "reworded", *(["seed"] if behaviour == "noise" else []), "centre"]
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(("data", "prompt", "loud", "seed"), [
    ("brain_mri", "brain tumour", False, 1), ("brain_mri", "brain tumour", False, 7), ("brain_mri", "brain tumour", True, 7),
    ("chest_xray", "both lungs", False, 1), ("chest_xray", "both lungs", False, 5), ("chest_xray", "both lungs", True, 8)])
def test_random_weights_never_pass(data: str, prompt: str, loud: bool, seed: int, tmp_path: Path) -> None:
    """Maps of these change with every text, and so for what is absent; they change as much for the same in other words."""
    from transformers import CLIPConfig, CLIPModel

    folder = make("clip", tmp_path / "clip")
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig.from_pretrained(folder))
    (louder(model) if loud else model).save_pretrained(folder)
    records = [record for record in read_list(demo_folder()) if data in record.name][:5]
    report = check_localizer(create_localizer("bottleneck", checkpoint=folder, setting="fast", device="cpu"), records, prompt, progress=False)
    assert report.verdict != "pass", str(report)


def test_a_prompt_set_is_put_in_other_words_sentence_by_sentence_and_too_long_ones_are_left_out(scans: Path) -> None:
    asked = []

    class Reads(Fake):
        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            asked.append(prompts[0])
            if len(prompts[0]) > 40:
                raise ValueError("fake: prompt must be short.")
            return super().__call__(images, prompts)

    records = list(read_list(scans))[:2]
    ensemble = EnsembleLocalizer(Reads("follows"), ["lung", "both lungs"], ["chair"])
    kinds = {c.kind: c for c in check_localizer(ensemble, records, progress=False).contrasts}
    assert {"lung can be seen here", "both lungs can be seen here"} <= set(asked) and kinds["reworded"].correlation == pytest.approx(1)
    long = check_localizer(Reads("follows"), records, "a very long prompt about both lungs", progress=False)
    assert "reworded" not in [c.kind for c in long.contrasts] and long.verdict == "pass"


def test_limits_are_told_beside_the_figures_and_can_be_changed(scans: Path, tmp_path: Path, clipseg_folder: Path, capsys: pytest.CaptureFixture) -> None:
    records = list(read_list(scans))
    told = str(check_localizer(Fake("fainter"), records, "both lungs", progress=False))
    assert "shift >= 0.35, or >= 0.1 with correlation <= 0.7" in told and "less than 90 %" in told and "correlation < 0.8" in told
    strict = CheckLimits.changed(["apart=0.9"])
    report = check_localizer(Fake("fainter"), records, "both lungs", limits=strict, progress=False)
    assert report.verdict == "fail" and "shift >= 0.9, or" in str(report) and report.to_dict()["limits"]["apart"] == 0.9
    out = tmp_path / "check"
    asked = ["localize", "check", str(scans), "--prompt", "x", "--localizer", "clipseg", "--checkpoint", str(clipseg_folder), "--device", "cpu", "--out", str(out)]
    assert main([*asked, "--limit", "peak=0", "--limit", "silent=1", "--limit", "shift=0"]) in (0, 2)
    stored = json.loads((out / "check.json").read_text())["limits"]
    assert (stored["peak"], stored["silent"], stored["shift"], stored["same"]) == (0, 1, 0, 0.9)
    for wrong in ("same", "nothing=1", "same=x", "same=nan", "same=2", "=1"):
        capsys.readouterr()
        assert main([*asked, "--limit", wrong]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_seed_is_put_back_and_images_are_spread_over_the_list(scans: Path) -> None:
    noise, records = Fake("noise"), list(read_list(scans))
    assert check_localizer(noise, records, "x", count=3, progress=False).images == 3 and noise.seed == 0
    with pytest.raises(ValueError, match="at least 2"):
        check_localizer(noise, records, "x", count=1, progress=False)


def test_shipped_localizer_passes_because_it_refuses_what_it_does_not_know() -> None:
    records = [record for record in read_list(demo_folder()) if "chest_xray" in record.name][:4]
    report = check_localizer(create_localizer("tiny", device="cpu"), records, "both lungs", progress=False)
    assert report.verdict == "pass" and all(c.refused == 1 for c in report.contrasts if c.text and c.kind != "reworded") and report.shown[0].others["absent"] is None
    left = check_localizer(create_localizer("tiny", device="cpu"), records, "left lung", neutral="both lungs", absent="right lung", progress=False)
    found = {c.kind: c for c in left.contrasts}
    assert left.verdict == "pass" and found["absent"].shift > 0.8 > found["neutral"].shift > 0.2


def test_negative_prompts_are_subtracted_from_every_map(scans: Path) -> None:
    class Two(Fake):
        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            bias = spot(images, 0.8, 0.8)
            return (bias if prompts[0] == "bias" else bias + 0.5 * spot(images, 0.2, 0.2 if "lung" in prompts[0] else 0.6)).clamp(0, 1)

    records = list(read_list(scans))
    plain = check_localizer(Two("x"), records, "lung", progress=False)
    less = check_localizer(EnsembleLocalizer(Two("x"), ["lung"], ["bias"]), records, None, progress=False)
    found, left = ({c.kind: c for c in report.contrasts} for report in (plain, less))
    assert found["absent"].shift < 0.5 < left["absent"].shift and less.verdict == "pass"


def test_figures_are_those_of_numpy_and_of_paper_and_pencil() -> None:
    a, b = torch.rand(2, 9, 7, generator=torch.Generator().manual_seed(0)).unbind()
    assert correlation(a, b) == pytest.approx(np.corrcoef(a.flatten(), b.flatten())[0, 1])
    assert np.isnan(correlation(a, torch.full((9, 7), 0.3))) and correlation(a, 2 * a) == pytest.approx(1)
    assert mass_shift(a, a) == 0 and mass_shift(a, 0 * a) == 1 and mass_shift(0 * a, 0 * a) == 0
    assert mass_shift(torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([[0.0, 0], [0, 1]])) == 1
    assert mass_shift(a, 3 * a) == pytest.approx(0.5)
    prior = centre_prior(5, 7)
    assert prior[2, 3] == prior.max() == 1 and prior[0, 0] == pytest.approx(float(np.exp(-(0.4**2 + (3 / 7) ** 2) / (2 * 0.25**2))))
    assert random_letters(0) == random_letters(0) != random_letters(1)


def test_a_text_that_was_refused_counts_as_followed() -> None:
    same = Contrast("absent", "x", 1.0, 0.0, 0.0)
    assert judge([same], 0.0)[0] == "fail"
    assert judge([Contrast("absent", "x", 1.0, 0.0, 0.6)], 0.0)[0] == "pass"
    assert judge([Contrast("absent", "x", 0.8, 0.2, 0.0)], 0.0)[0] == "weak" and judge([Contrast("neutral", "x", 1.0, 0.0, 0.0)], 0.0)[0] == "weak"


def test_map_with_nan_and_lists_without_images_are_refused_in_one_sentence(scans: Path) -> None:
    records = list(read_list(scans))
    edges = create_localizer("edges", device="cpu")
    for localizer, images, prompt, sentence in [(Fake("broken"), records, "x", "NaN"), (Fake("blind"), [], "x", "got none: the list is empty"),
                                                (Fake("blind"), records, None, "prompt must be given"), (edges, records, "x", "must read prompts")]:
        with pytest.raises(ValueError, match=sentence):
            check_localizer(localizer, images, prompt, progress=False)


def test_localize_stops_where_maps_do_not_follow_the_text_unless_forced(scans: Path, tmp_path: Path, clipseg_folder: Path, capsys: pytest.CaptureFixture) -> None:
    from transformers import CLIPSegForImageSegmentation

    blind = tmp_path / "blind"
    blind.mkdir()
    for path in clipseg_folder.iterdir():
        (blind / path.name).write_bytes(path.read_bytes())
    model = CLIPSegForImageSegmentation.from_pretrained(clipseg_folder)
    torch.nn.init.zeros_(model.clip.text_projection.weight)  # every text is the same
    model.save_pretrained(blind)
    options = {"localizer": "clipseg", "checkpoint": blind, "device": "cpu", "progress": False}
    with pytest.raises(ValueError, match=r"do not follow the text: the map of \"sitting on a chair\" is the same.*--force"):
        run_localize(scans, "both lungs", tmp_path / "regions", **options)
    assert not (tmp_path / "regions").exists() and "verdict: fail" in capsys.readouterr().out
    assert run_localize(scans, "both lungs", tmp_path / "regions", force=True, **options).images == 5
    assert json.loads((tmp_path / "regions" / "report.json").read_text())["check"]["verdict"] == "fail"
    capsys.readouterr()
    with pytest.raises(ValueError, match="do not follow the text"):
        run_localize(scans, "both lungs", tmp_path / "regions", **options)
    assert "verdict" not in capsys.readouterr().out  # remembered, not computed again


def test_a_check_of_other_images_or_texts_is_not_taken_for_this_one(scans: Path, tmp_path: Path) -> None:
    """A pass on one data set had let every other one through that went into the same folder."""
    from mwm.localize.command import _note, first_check
    from mwm.localize.region_report import FILE

    (tmp_path / "out").mkdir()
    records = sorted(path.name for path in scans.rglob("*.*g"))

    def asked(localizer: Fake, images: Path = scans, **options: str) -> dict:
        return first_check(localizer, images, "both lungs", tmp_path / "out", progress=False, **options)

    _note(tmp_path / "out" / FILE, asked(Fake("follows")))
    assert asked(Fake("blind"))["verdict"] == "pass"  # the same name, settings, images and texts: not asked again
    (tmp_path / "list.csv").write_text("file,prompt\n" + "".join(f"{name},the lungs\n" for name in records))
    (tmp_path / "fewer.txt").write_text("\n".join(records[1:]) + "\n")
    for images, options in ((tmp_path / "list.csv", {"root": scans}), (tmp_path / "fewer.txt", {"root": scans}), (scans, {"absent": "a red car"})):
        with pytest.raises(ValueError, match="do not follow the text"):
            asked(Fake("blind"), images, **options)


def test_command_draws_twelve_images_and_fails_with_a_code(scans: Path, tmp_path: Path, clipseg_folder: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "check"
    code = main(["localize", "check", str(demo_folder() / "chest_xray"), "--prompt", "both lungs", "--count", "4", "--device", "cpu", "--out", str(out)])
    assert code == 0 and "verdict: pass" in capsys.readouterr().out
    with Image.open(out / "check.png") as picture:
        assert picture.width > 700
    assert json.loads((out / "check.json").read_text())["verdict"] == "pass"
    asked = ["localize", "check", str(scans), "--prompt-set", "wound:P1", "--localizer", "clipseg", "--checkpoint", str(clipseg_folder), "--device", "cpu", "--out", str(out)]
    assert main(asked) in (0, 2)
    told = json.loads((out / "check.json").read_text())
    assert told["contrasts"][1]["text"] == "a chest X-ray" and str(scans.parent) not in (out / "check.json").read_text()
    assert main([*asked, "--prompt", "x"]) == 2 and "one of prompt and prompt_set" in capsys.readouterr().err
    assert main([*asked, "--setting", "layer"]) == 2 and "NAME=VALUE" in capsys.readouterr().err


def test_which_localizers_are_checked_first() -> None:
    assert may_ignore_text(Fake("follows"))
    assert not any(may_ignore_text(create_localizer(name, device="cpu")) for name in ("tiny", "edges", "threshold"))
