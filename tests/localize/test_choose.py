"""Settings are chosen by what a good region has without labels, or by masks, and the report says which."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mwm.cli import main
from mwm.data import demo_folder, read_list
from mwm.localize import UnsupportedImage
from mwm.localize.choose import Candidate, candidates_of, choose_settings, corrected, small_dice, telling_dice


class Fake:
    """Bright pixels, the same middle for every image, noise, or everything: as its setting says."""

    name = "fake"

    def __init__(self, how: str = "bright") -> None:
        self.how, self.fingerprint, self.seed = how, f"fake {how}", 0

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        shape = (len(images), *images.shape[2:])
        if self.how == "bright":
            return images.mean(1) * 0.98 + 0.01 * (len(prompts[0]) % 2)
        if self.how == "middle":
            heat = torch.zeros(shape)
            heat[:, shape[1] // 4 : -shape[1] // 4, shape[2] // 4 : -shape[2] // 4] = 1
            return heat
        if self.how == "everything":
            return torch.ones(shape) - 0.1 * torch.rand(shape, generator=torch.Generator().manual_seed(0))
        return torch.rand(shape, generator=torch.Generator().manual_seed(1009 * self.seed + len(prompts[0]) + 10 * int(1000 * images.sum())))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight dark images with a bright square, its mask, and an index CSV."""
    rows = []
    for k in range(8):
        draw = np.random.default_rng(k)
        pixels, mask = draw.integers(0, 60, (48, 48), dtype=np.uint8), np.zeros((48, 48), np.uint8)
        top, left = draw.integers(0, 32, 2)
        pixels[top : top + 14, left : left + 14], mask[top : top + 14, left : left + 14] = 230, 255
        for folder, values in (("images", pixels), ("masks", mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(values).save(tmp_path / folder / f"{k}.png")
        rows.append({"file": f"images/{k}.png", "mask": f"masks/{k}.png"})
    with (tmp_path / "index.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


def choose(data: Path, candidates: list[Candidate], **options: object) -> object:
    return choose_settings(lambda settings: Fake(**settings), list(read_list(data / "index.csv")), lambda level: ["a", "bc", "def"], candidates, progress=False, **options)


def test_regions_that_follow_the_image_beat_noise_and_those_that_are_always_the_same(data: Path) -> None:
    found = choose(data, candidates_of({"how": ["noise", "middle", "bright", "everything"]}))
    order = [dict(j.candidate.localizer)["how"] for j in found.judged]
    scores = dict(zip(order, (j.score for j in found.judged), strict=True))
    assert order[0] == "bright" and order[-1] == "everything" and scores["bright"] > 0.8
    assert scores["middle"] == 0 and abs(scores["noise"]) < 0.1 and scores["everything"] == -float("inf")
    assert not found.with_labels and "No label was read" in str(found) and "without labels" in found.to_dict()["chosen_by"]
    json.dumps(found.to_dict(), allow_nan=False)


class Choosy(Fake):
    """Bright pixels; refuses all images but those whose square lies in the upper half, where its setting says so."""

    def __init__(self, choosy: bool = False, shift: int = 0) -> None:
        super().__init__("bright")
        self.choosy, self.shift = choosy, shift

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        if self.choosy and any(float(one[0, :20].amax()) < 0.5 for one in images):
            raise UnsupportedImage("choosy: no")
        return super().__call__(images, prompts).roll(self.shift, -1)


def test_settings_that_refuse_the_hard_images_do_not_win_by_the_others(data: Path) -> None:
    """Dice of a refused image is that of an empty region; it had been left out, and the candidates were judged on different images."""
    records, candidates = list(read_list(data / "index.csv")), candidates_of({"choosy": [True, False], "shift": [1]})
    for masks in ("masks", None):
        found = choose_settings(lambda given: Choosy(given["choosy"], 0 if given["choosy"] else 1), records, lambda level: ["a", "bc"], candidates, masks=masks, progress=False)
        by = {dict(j.candidate.localizer)["choosy"]: j for j in found.judged}
        assert by[True].useless > 0.3 and by[False].useless == 0
        if masks:
            assert by[False].dice > 0.9 > by[True].dice == pytest.approx(1 - by[True].useless, abs=0.02) and found.judged[0] is by[False]


def test_regions_that_are_empty_alike_are_no_agreement(data: Path) -> None:
    """A cut that leaves some images empty had gained agreement and stability by them."""
    assert telling_dice(torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)) is None
    assert telling_dice(torch.ones(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)) is None
    assert telling_dice(torch.tensor([True, False]), torch.tensor([False, False])) == 0

    class Fading(Fake):
        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            noise = torch.rand(images[:, 0].shape, generator=torch.Generator().manual_seed(1009 * self.seed + len(prompts[0]) + int(1000 * images.sum())))
            weak = (images[:, 0, :20].amax((1, 2)) < 0.5).float()[:, None, None]  # nothing but a faint map on some images, noise on the others
            return noise * (1 - weak) + 0.05 * noise * weak

    found = choose_settings(lambda settings: Fading(), list(read_list(data / "index.csv")), lambda level: ["a", "bc", "def"], candidates_of({"threshold": [0.5]}), progress=False)
    assert 0.2 < found.judged[0].useless <= 0.5 and abs(found.judged[0].agreement) < 0.1 and abs(found.judged[0].stability) < 0.1


def test_masks_decide_alone_where_they_are_given(data: Path) -> None:
    found = choose(data, candidates_of({"how": ["middle", "bright"], "threshold": [0.5, 0.95]}), masks="masks")
    assert dict(found.best.localizer)["how"] == "bright" and dict(found.best.refine)["threshold"] == 0.5 and found.judged[0].dice > 0.95
    assert all(j.agreement != j.agreement and j.stability != j.stability for j in found.judged)
    assert found.to_dict()["labels_used"] and "do not report results on them" in str(found)


def test_without_masks_no_mask_is_opened(data: Path) -> None:
    for path in (data / "masks").iterdir():
        path.unlink()
    assert not choose(data, candidates_of({"threshold": [0.5]})).with_labels


def test_candidates_are_all_combinations_once() -> None:
    found = candidates_of({"method": ["threshold", "otsu"], "threshold": [0.3, 0.5], "layer": [7, 8], "level": ["P1"]})
    assert len(found) == 2 * (2 + 1) and all(c.level == "P1" for c in found)
    assert Candidate((("crf", True), ("expand", 1.2)), (("layer", 7),), "P2").flags() == "--crf --expand 1.2 --setting layer=7 --prompt-set …:P2"
    for vary, sentence in [({"threshold": [2.0]}, "threshold must be in"), ({"layer": []}, "must have values"), ({"a": range(30), "b": range(30)}, "at most 500")]:
        with pytest.raises(ValueError, match=sentence):
            candidates_of(vary)


def test_figures_by_hand() -> None:
    a, b = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    assert small_dice(a, b) == pytest.approx(2 / 3) and small_dice(a & False, b & False) == 1
    assert corrected(0.9, 0.5) == pytest.approx(0.8) and corrected(1.0, 1.0) == 0 and corrected(0.3, 0.5) < 0


def test_command_says_what_decided(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "choose"
    asked = ["localize", "choose", str(demo_folder() / "index.csv"), "--split", "none", "--out", str(out)]
    assert main(asked) == 2 and "one of --prompt and --prompt-set" in capsys.readouterr().err
    xrays = ["localize", "choose", str(demo_folder() / "chest_xray"), "--prompt-set", "chest_xray_lungs:P1", "--count", "3", "--device", "cpu", "--out", str(out)]
    assert main([*xrays, "--vary", "threshold=0.3,0.5"]) == 0
    assert "No label was read" in capsys.readouterr().out and json.loads((out / "choose.json").read_text())["labels_used"] is False
    squares = ["localize", "choose", str(data / "index.csv"), "--prompt", "body", "--localizer", "threshold", "--out", str(out)]
    assert main([*squares, "--vary", "expand=1,1.3", "--masks", "masks"]) == 0
    assert json.loads((out / "choose.json").read_text())["labels_used"] is True and "do not report results" in capsys.readouterr().out
    for more, sentence in [(["--vary", "threshold"], "NAME=V1,V2"), (["--vary", "depth=3"], "settings of tiny must be"), (["--count", "2"], "at least 3"),
                           (["--vary", "level=P9"], "must be one of P1")]:
        assert main([*xrays, *more]) == 2
        assert sentence in capsys.readouterr().err
