"""Edge strength as a region."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

import mwm
from mwm.data import open_regions, read_list
from mwm.localize import Localizer, run_localize
from mwm.localize.edges import EdgesLocalizer


@pytest.fixture
def textured() -> torch.Tensor:
    """A flat image with a chequered square at rows 40 … 80, columns 60 … 100. [1, 1, 120, 160]"""
    image = torch.full((1, 1, 120, 160), 0.3)
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    image[0, 0, 40:80, 60:100] = 0.2 + 0.6 * ((rows // 5 + columns // 5) % 2)
    return image


def test_score_is_high_on_texture_and_low_elsewhere(textured: torch.Tensor) -> None:
    localizer = EdgesLocalizer("cpu")
    assert isinstance(localizer, Localizer)
    score = localizer(textured, ["anything"])
    assert score.shape == (1, 120, 160) and score.dtype == torch.float32 and float(score.min()) >= 0 and float(score.max()) == 1
    assert float(score[0, 48:72, 68:92].min()) > 0.6 and float(score[0, :20].max()) < 0.02


def test_score_equals_scipys_filters(textured: torch.Tensor) -> None:
    edge = (120 * 160) ** 0.5
    grey = textured[0, 0].double().numpy()
    smooth = ndimage.gaussian_filter(grey, edge / 150, mode="nearest", truncate=round(3 * edge / 150) / (edge / 150))
    padded = np.pad(smooth, 1, mode="edge")
    slope = np.hypot(padded[1:-1, 2:] - padded[1:-1, :-2], padded[2:, 1:-1] - padded[:-2, 1:-1])
    wide = ndimage.gaussian_filter(slope, edge / 28, mode="nearest", truncate=round(3 * edge / 28) / (edge / 28))
    assert np.abs(EdgesLocalizer("cpu")(textured, ["x"])[0].numpy() - wide / wide.max()).max() < 1e-4


def test_brightness_contrast_text_and_batch_do_not_matter(textured: torch.Tensor) -> None:
    localizer = EdgesLocalizer("cpu")
    alone = localizer(textured, ["a"])
    torch.testing.assert_close(localizer(textured * 0.5 + 0.2, ["b"]), alone, atol=1e-4, rtol=0)
    both = localizer(torch.cat([textured, torch.rand(1, 1, 120, 160)]), ["a", "c"])
    assert torch.equal(both[:1], alone)
    assert torch.equal(localizer(textured.expand(1, 3, -1, -1), ["a"]), alone) or (localizer(textured.expand(1, 3, -1, -1), ["a"]) - alone).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (3, 3), (17, 5)])
def test_small_and_flat_images_give_maps(shape: tuple[int, int]) -> None:
    localizer = EdgesLocalizer("cpu")
    assert localizer(torch.rand(2, 1, *shape), ["a", "b"]).isfinite().all()
    assert not localizer(torch.full((1, 1, *shape), 0.7), ["a"]).any()


def test_folder_needs_no_prompt(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    pixels = np.full((60, 60), 70, np.uint8)
    pixels[20:40:4, 20:40] = 200
    Image.fromarray(pixels).save(tmp_path / "scans" / "a.png")
    report = run_localize(tmp_path / "scans", out=tmp_path / "regions", localizer="edges", device="cpu", progress=False)
    assert report.images == 1 and report.empty == 0
    region = open_regions(tmp_path / "regions").region(read_list(tmp_path / "scans")[0])
    assert region[30, 30] == 1 and region[2, 2] == 0


def test_widths_are_checked_and_part_of_the_fingerprint() -> None:
    assert mwm.create_localizer("edges", wide=0.1).fingerprint != mwm.create_localizer("edges").fingerprint
    with pytest.raises(ValueError, match="wide must be a share") as caught:
        mwm.create_localizer("edges", wide=0)
    assert "\n" not in str(caught.value)
