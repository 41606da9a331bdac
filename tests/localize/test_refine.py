"""From maps to regions: what is kept, and that a map that says nothing never becomes the whole image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mwm.localize import RefineSettings, component_boxes, refine
from mwm.localize.refine import two_means_threshold


def three_blobs() -> torch.Tensor:
    """Blobs of 100, 64 and 4 pixels with values 0.9, 0.7 and 0.95 on a floor of 0.1. [60, 80]"""
    heat = torch.full((60, 80), 0.1)
    heat[5:15, 5:15] = 0.9
    heat[30:38, 50:58] = 0.7
    heat[50:52, 70:72] = 0.95
    return heat


def test_threshold_keeps_values_from_the_threshold_on() -> None:
    heat = torch.tensor([[0.2, 0.5, 0.51], [0.49, 0.8, 0.0]])
    assert refine(heat).tolist() == [[0, 1, 1], [0, 1, 0]]
    assert refine(heat, RefineSettings(threshold=0.0)).tolist() == [[1, 1, 1], [1, 1, 0]]


def test_largest_components_are_kept_by_area_not_by_value() -> None:
    one = refine(three_blobs(), RefineSettings(components=1))
    assert one.sum() == 100 and one[5:15, 5:15].all()
    two = refine(three_blobs(), RefineSettings(components=2))
    assert two.sum() == 164
    assert refine(three_blobs(), RefineSettings(components=9)).sum() == 168


def test_diagonal_neighbours_are_one_component() -> None:
    heat = torch.eye(6) * 0.9
    assert refine(heat, RefineSettings(components=1)).sum() == 6


def test_small_components_are_dropped_by_their_share_of_the_image() -> None:
    region = refine(three_blobs(), RefineSettings(min_area=0.01))  # 48 pixels
    assert region.sum() == 164
    assert refine(three_blobs(), RefineSettings(min_area=0.5)).sum() == 0


def test_boxes_are_scaled_about_their_centre_and_clipped() -> None:
    settings = RefineSettings(components=2, expand=1.0)
    assert refine(three_blobs(), settings).sum() == 164
    grown = refine(three_blobs(), RefineSettings(components=2, expand=1.5))
    assert component_boxes(grown) == [(3, 3, 18, 18), (28, 48, 40, 60)]
    corner = torch.zeros(20, 20)
    corner[0:4, 16:20] = 1
    assert component_boxes(refine(corner, RefineSettings(expand=2.0))) == [(0, 14, 6, 20)]


def test_expand_one_fills_the_bounding_box_of_a_shape() -> None:
    ring = torch.zeros(30, 30)
    ring[5:25, 5:25] = 1
    ring[8:22, 8:22] = 0
    assert refine(ring, RefineSettings(expand=1.0)).sum() == 400


def test_soft_keeps_the_values_inside_the_region() -> None:
    heat = three_blobs()
    region = refine(heat, RefineSettings(components=2, soft=True))
    assert torch.equal(region, torch.where((region > 0), heat, 0.0))
    assert region.unique().tolist() == pytest.approx([0.0, 0.7, 0.9])


def test_kmeans_finds_the_boundary_between_two_levels() -> None:
    generator = torch.Generator().manual_seed(0)
    heat = (three_blobs() + 0.05 * torch.randn(60, 80, generator=generator)).clamp(0, 1)
    region = refine(heat, RefineSettings(method="kmeans"))
    assert torch.equal(region > 0, three_blobs() > 0.3)


def test_kmeans_is_lloyds_fixed_point() -> None:
    values = np.random.default_rng(0).beta(0.4, 1.5, size=5000).astype(np.float32)
    boundary = two_means_threshold(values)
    centres = values[values > boundary].mean(dtype=np.float64), values[values <= boundary].mean(dtype=np.float64)
    assert boundary == pytest.approx(sum(centres) / 2, abs=1e-9)
    assert np.array_equal(np.abs(values - centres[0]) < np.abs(values - centres[1]), values > boundary)


@pytest.mark.parametrize("method", ["threshold", "kmeans"])
@pytest.mark.parametrize("value", [0.0, 0.05, 0.6, 1.0])
def test_constant_map_gives_an_empty_region_never_the_whole_image(method: str, value: float) -> None:
    for settings in (RefineSettings(method=method), RefineSettings(method=method, threshold=0.0, soft=True, expand=1.5, min_peak=0.0)):
        assert refine(torch.full((20, 20), value), settings).sum() == 0


@pytest.mark.parametrize("method", ["threshold", "kmeans"])
def test_map_without_a_peak_is_empty_even_for_kmeans(method: str) -> None:
    heat = torch.rand(40, 40, generator=torch.Generator().manual_seed(0)) * 0.08
    assert refine(heat, RefineSettings(method=method, threshold=0.01)).sum() == 0


def test_batch_is_refined_map_by_map() -> None:
    batch = torch.stack([three_blobs(), torch.zeros(60, 80), three_blobs().flip(1)])
    together = refine(batch, RefineSettings(method="kmeans", components=1))
    assert together.dtype == torch.float32 and together.shape == batch.shape
    for one, region in zip(batch, together, strict=True):
        assert torch.equal(refine(one, RefineSettings(method="kmeans", components=1)), region)
    assert refine(batch[:0]).shape == (0, 60, 80)


def test_map_itself_is_not_changed() -> None:
    heat = three_blobs()
    before = heat.clone()
    refine(heat, RefineSettings(components=1, expand=1.5, soft=True))
    assert torch.equal(heat, before)


@pytest.mark.parametrize(
    ("heat", "sentence"),
    [
        (torch.tensor([[0.1, float("nan")]]), "NaN"),
        (torch.tensor([[0.1, float("inf")]]), "NaN or infinity"),
        (torch.tensor([[0.1, 3.0]]), r"in \[0, 1\], got 0.1 … 3"),
        (torch.tensor([[-0.5, 0.3]]), r"in \[0, 1\]"),
        (torch.zeros(1, 1, 4, 4), r"\[B, H, W\]"),
        (torch.zeros(4, 4, dtype=torch.uint8), "Divide a 0 … 255 map"),
    ],
)
def test_bad_maps_are_refused(heat: torch.Tensor, sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence):
        refine(heat)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"method": "crf"}, "threshold, kmeans"),
        ({"threshold": 1.2}, r"threshold must be in \[0, 1\]"),
        ({"threshold": "0.5"}, r"threshold must be in \[0, 1\]"),
        ({"min_area": -0.1}, "min_area"),
        ({"components": 0}, "components must be"),
        ({"components": 1.5}, "components must be"),
        ({"expand": 0.9}, "expand must be a factor of at least 1"),
        ({"expand": float("nan")}, "expand must be"),
    ],
)
def test_bad_settings_are_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RefineSettings(**settings)
