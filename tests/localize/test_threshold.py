"""Body and lungs by grey values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mwm
from mwm.localize import Localizer, localize_folder
from mwm.localize.threshold import body, lungs, otsu


def chest(size: int = 160, lung: float = 0.25, noise: float = 0.02, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An ellipse of tissue in air with two dark ellipses in it: picture, body, lungs."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size - 0.5
    whole = (x / 0.45) ** 2 + (y / 0.38) ** 2 < 1
    both = ((abs(x) - 0.2) / 0.11) ** 2 + (y / 0.22) ** 2 < 1
    picture = np.where(both, lung, np.where(whole, 0.7, 0.03)) + noise * np.random.default_rng(seed).standard_normal((size, size))
    return picture.clip(0, 1).astype(np.float32), whole, both


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("values", [np.random.default_rng(0).uniform(size=(64, 64)), np.random.default_rng(1).beta(0.3, 0.8, (50, 70)), chest()[0]])
def test_otsu_is_that_of_scikit_image(values: np.ndarray) -> None:
    filters = pytest.importorskip("skimage.filters")
    edge = (values.max() - values.min()) / 256
    assert abs(otsu(values) - (filters.threshold_otsu(values, 256) + edge / 2)) < edge * 1e-3  # skimage returns the centre of the bin
    assert otsu(np.full((3, 3), 0.4)) == 0.4


@pytest.mark.parametrize("size", [64, 160, 400])
def test_body_and_lungs_of_a_drawn_chest_are_found_at_any_size(size: int) -> None:
    picture, whole, both = chest(size)
    assert dice(body(picture), whole) > 0.97
    assert dice(lungs(picture), both) > 0.92


def test_lungs_in_the_body_are_body_though_as_dark_as_air() -> None:
    picture, whole, _ = chest(lung=0.03)
    assert dice(body(picture), whole) > 0.97


def test_what_touches_the_border_or_is_small_is_no_lung() -> None:
    picture = chest(noise=0.0)[0]
    picture[76:79, 78:82] = 0.2
    assert not lungs(picture)[76:79, 78:82].any()
    dark = np.full((80, 80), 0.7, np.float32)
    dark[:, :20] = 0.1
    assert not lungs(dark)[:, :20].any()


def test_localizer_meets_the_protocol_and_its_prompt_chooses(tmp_path: Path) -> None:
    localizer = mwm.create_localizer("threshold")
    assert isinstance(localizer, Localizer)
    picture, whole, both = chest()
    images = torch.from_numpy(picture)[None, None].expand(2, 3, -1, -1)
    found = localizer(images, ["the body of the patient", "Both lungs."])
    assert found.shape == (2, 160, 160) and found.dtype == torch.float32 and set(found.unique().tolist()) == {0.0, 1.0}
    assert dice(found[0].numpy() > 0, whole) > 0.97 and dice(found[1].numpy() > 0, both) > 0.9
    assert torch.equal(localizer(images[:1], ["lungs"])[0], found[1])
    (tmp_path / "scans").mkdir()
    Image.fromarray((picture * 255).astype(np.uint8)).save(tmp_path / "scans" / "a.png")
    report = localize_folder(tmp_path / "scans", "lungs", localizer, tmp_path / "regions", progress=False)
    assert report.empty == 0 and abs(report.area - both.mean()) < 0.02


@pytest.mark.parametrize("prompt", ["liver", "lungs and body", "left atrium"])
def test_other_prompts_are_refused_in_one_sentence(prompt: str) -> None:
    with pytest.raises(ValueError, match="must name either body or lungs") as caught:
        mwm.create_localizer("threshold")(torch.rand(1, 1, 20, 20), [prompt])
    assert "\n" not in str(caught.value)


def test_an_image_without_contrast_has_no_region() -> None:
    localizer = mwm.create_localizer("threshold")
    for value in (0.0, 0.5, 1.0):
        assert not localizer(torch.full((2, 1, 30, 40), value), ["body", "lungs"]).any()
