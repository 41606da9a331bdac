"""Boxes land where the pixels of their objects land, for every way an image meets the size, and come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mwm.data import ReadSettings
from mwm.data.geometry import fit
from mwm.transfer.placing import placing


@pytest.mark.parametrize("aspect", ["pad", "stretch", "crop"])
@pytest.mark.parametrize("stored", [(90, 60), (60, 90), (256, 189), (31, 31)])
@pytest.mark.parametrize("spacing", [None, (0.5, 1.0)])
def test_box_follows_its_pixels_and_comes_back(aspect: str, stored: tuple[int, int], spacing: tuple[float, float] | None) -> None:
    settings = ReadSettings(aspect=aspect, size=(64, 48))
    place = placing(stored, settings, spacing if aspect != "stretch" else None)
    height, width = stored
    # A ramp from 0 to 1 in each direction tells where a pixel of the result comes from.
    ramps = torch.stack([((torch.arange(height) + 0.5) / height)[:, None].expand(height, width), ((torch.arange(width) + 0.5) / width)[None].expand(height, width)])
    seen = fit(ramps.contiguous(), settings, spacing if aspect != "stretch" else None)
    middle = place.to_model(np.array([[width / 2, height / 2, width / 2, height / 2]]))[0]
    for axis, (at, edge, long) in enumerate(((middle[1], height, 64), (middle[0], width, 48))):
        line = seen[axis, :, 24] if axis == 0 else seen[axis, 32, :]
        slope = place.scale[axis]
        k = int(np.clip(round(at - 0.5), 1, long - 2))
        source = ((k + 0.5) - place.offset[axis]) / slope
        assert abs(float(line[k]) * edge - source) < 0.51, (axis, k)
    boxes = np.array([[0.4 * width, 0.4 * height, 0.6 * width, 0.55 * height]])
    np.testing.assert_allclose(place.to_source(place.to_model(boxes)), boxes, atol=1e-9)


def test_without_a_size_nothing_moves() -> None:
    boxes = np.array([[1.0, 2, 3, 4]])
    np.testing.assert_array_equal(placing((9, 9), ReadSettings()).to_model(boxes), boxes)


def test_boxes_come_back_inside_the_stored_image() -> None:
    place = placing((20, 40), ReadSettings(size=(32, 32)))
    np.testing.assert_allclose(place.to_source(np.array([[-5.0, 0, 50, 32]])), [[0, 0, 40, 20]])
