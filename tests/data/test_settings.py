"""Read settings: checked, stored, compared; intensity and geometry do what they say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mwm.data import DataError, ReadSettings, read_image
from mwm.data.geometry import fit
from mwm.data.intensity import map_intensity
from mwm.data.raw import Raw


@pytest.mark.parametrize("values", [
    {"intensity": "bright"}, {"intensity": "window"}, {"intensity": "window=40"}, {"intensity": "window=40,0"}, {"intensity": "window=40,-5"}, {"intensity": "window=nan,5"},
    {"intensity": "window=1,2,3"}, {"intensity": 5},
    {"aspect": "zoom"}, {"orientation": "left"}, {"slice_axis": 3}, {"slice_axis": "w"}, {"size": (0, 4)}, {"size": (4,)}, {"size": (4, 4.5)},
])
def test_wrong_settings_are_refused_in_one_sentence(values: dict) -> None:
    with pytest.raises(DataError) as caught:
        ReadSettings(**values)
    assert next(iter(values)) in str(caught.value)


def test_settings_survive_json() -> None:
    settings = ReadSettings(intensity="window=-600,1500", size=(32, 64), aspect="crop", slice_axis="coronal", orientation="stored")
    assert settings.slice_axis == 1 and ReadSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert ReadSettings(size=48).size == (48, 48)
    with pytest.raises(DataError, match="'gamma' is not known"):
        ReadSettings.from_dict({"gamma": 2})


def test_each_difference_is_a_sentence() -> None:
    now, stored = ReadSettings(intensity="minmax", aspect="crop"), ReadSettings()
    assert len(now.differences(stored.to_dict())) == 2 and "intensity is 'minmax' now and was 'auto'" in now.differences(stored)[0]
    assert now.differences(now) == []


@pytest.mark.parametrize(("intensity", "low", "high"), [("minmax", 0, 399), ("percentile", 399 * 0.005, 399 * 0.995), ("window=100,50", 75, 125),
                                                      ("auto", 399 * 0.005, 399 * 0.995)])
def test_intensities_map_their_bounds_to_0_and_1(intensity: str, low: float, high: float) -> None:
    values = np.arange(400, dtype=np.uint16).reshape(1, 20, 20)
    mapped = map_intensity(Raw(values), ReadSettings(intensity=intensity))
    assert np.allclose(mapped, np.clip((values.astype(float) - low) / (high - low), 0, 1), atol=1e-6) and mapped.dtype == np.float32


def test_percentile_also_applies_to_8_bits_when_asked(png) -> None:
    path = png("a.png", (np.arange(100).reshape(10, 10) + 50).astype(np.uint8))
    assert read_image(path).max() < 0.6 and read_image(path, intensity="percentile").max() == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("intensity", ["minmax", "percentile"])
def test_a_flat_image_becomes_zeros(dtype, intensity: str) -> None:
    assert map_intensity(Raw(np.full((1, 3, 3), 7, dtype)), ReadSettings(intensity=intensity)).tolist() == [[[0.0] * 3] * 3]


def test_percentiles_that_coincide_fall_back_to_the_extremes() -> None:
    values = np.zeros((1, 100, 100), np.uint16)
    values[0, 0, 0] = 500  # a mask-like image: all but one pixel are equal
    assert map_intensity(Raw(values), ReadSettings()).max() == 1


def test_large_integers_keep_their_differences() -> None:
    values = (np.arange(4, dtype=np.uint32) + 4_000_000_000).reshape(1, 2, 2)
    assert np.allclose(map_intensity(Raw(values), ReadSettings(intensity="minmax")).ravel(), [0, 1 / 3, 2 / 3, 1])


def test_pad_keeps_everything_and_its_proportions() -> None:
    image = fit(torch.ones(1, 20, 40), ReadSettings(size=(32, 32), aspect="pad"))
    assert torch.allclose(image[0, 8:24], torch.ones(16, 32)) and image[0, :8].eq(0).all() and image[0, 24:].eq(0).all()


def test_crop_keeps_the_centre_and_its_proportions() -> None:
    image = torch.zeros(1, 20, 40)
    image[..., 10:30] = 1
    assert fit(image, ReadSettings(size=(20, 20), aspect="crop")).eq(1).all()


def test_stretch_fills_the_frame() -> None:
    assert torch.allclose(fit(torch.ones(1, 20, 40), ReadSettings(size=(32, 16), aspect="stretch")), torch.ones(1, 32, 16))


@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_pixel_spacing_decides_the_proportions(aspect: str) -> None:
    image = torch.rand(1, 10, 40)  # 10 thick slices of 4 mm, 40 pixels of 1 mm: a square in the body
    assert torch.allclose(fit(image, ReadSettings(size=(24, 24), aspect=aspect), (4.0, 1.0)), fit(image, ReadSettings(size=(24, 24), aspect="stretch")))


@pytest.mark.parametrize("aspect", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (7, 5), (64, 64)])
def test_every_shape_reaches_the_size(aspect: str, shape: tuple[int, int]) -> None:
    image = fit(torch.rand(2, *shape), ReadSettings(size=(32, 48), aspect=aspect))
    assert image.shape == (2, 32, 48) and 0 <= image.min() and image.max() <= 1
