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


def test_otsu_is_scikit_images_and_cuts_each_map_by_itself() -> None:
    filters = pytest.importorskip("skimage.filters")
    maps = torch.rand(2, 40, 50, generator=torch.Generator().manual_seed(3)) ** torch.tensor([2.0, 6.0]).view(2, 1, 1)
    regions = refine(maps, RefineSettings(method="otsu"))
    for heat, region in zip(maps.numpy(), regions.numpy(), strict=True):
        differ = (heat > filters.threshold_otsu(heat, nbins=256)) != (region > 0)
        assert differ.mean() < 0.01  # both cut at a bin; they name its other end
    assert regions[0].mean() > 1.5 * regions[1].mean()


def test_holes_are_filled_before_parts_are_compared() -> None:
    heat = torch.zeros(40, 40)
    heat[2:16, 2:16] = 1
    heat[4:14, 4:14] = 0  # a frame of 96 pixels around 100
    heat[25:36, 25:36] = 1  # 121 pixels
    assert refine(heat, RefineSettings(components=1)).sum() == 121
    filled = refine(heat, RefineSettings(components=1, fill=True))
    assert filled.sum() == 196 and filled[9, 9] == 1
    heat[3, 2:16] = heat[2, 2:16] = 0  # open to the outside: no hole
    heat[14:16, 2:16] = 0
    assert refine(heat, RefineSettings(fill=True)).sum() == (heat > 0).sum()


def test_blur_softens_the_rim_and_keeps_the_place() -> None:
    heat = torch.zeros(64, 64)
    heat[20:40, 20:40] = 1
    soft = refine(heat, RefineSettings(blur=0.03))
    assert soft.max() <= 1 and 0 < soft[20, 30] < 1 and soft[30, 30] > 0.99 and soft[0, 0] == 0
    assert soft.sum() == pytest.approx(400, rel=0.02) and ((soft > 0.5) != (heat > 0)).sum() <= 12  # corners are rounded


def test_field_finds_the_edge_that_a_coarse_map_misses_and_never_gives_everything_or_nothing() -> None:
    image = torch.full((1, 128, 128), 0.2)
    image[:, 36:92, 38:94] = 0.8
    rows, columns = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    heat = torch.sigmoid((32 - torch.maximum((rows - 64).abs(), (columns - 64).abs())) / 4)  # a soft square that is 4 to 6 pixels too large
    drawn = refine(heat, RefineSettings(crf=True), image)
    truth = image[0] > 0.5
    dice = [2 * float((truth & (region > 0)).sum()) / float(truth.sum() + (region > 0).sum()) for region in (refine(heat), drawn)]
    assert dice[0] < 0.86 < 0.92 < dice[1]
    speck = torch.full((128, 128), 0.1)
    speck[5, 5] = 0.6
    assert torch.equal(refine(speck, RefineSettings(crf=True), image), refine(speck))  # the field would vote it off
    for flat in (torch.zeros(128, 128), torch.full((128, 128), 0.9)):
        assert refine(flat, RefineSettings(crf=True), image).sum() == 0
    assert torch.equal(refine(torch.stack([heat, speck]), RefineSettings(crf=True), image[None].expand(2, -1, -1, -1))[0], drawn)
    with pytest.raises(ValueError, match="images must be given with crf"):
        refine(heat, RefineSettings(crf=True))
    with pytest.raises(ValueError, match="NaN"):
        refine(heat * float("nan"), RefineSettings(crf=True), image)


def test_steps_around_a_sam_share_the_settings_without_doing_them_twice() -> None:
    settings = RefineSettings(method="kmeans", components=2, expand=1.2, blur=0.02, fill=True, crf=True, min_peak=0.3)
    before, after = settings.before_sam(), settings.after_sam()
    assert (before.expand, before.blur, before.soft, before.crf, before.components) == (None, None, False, True, 2)
    assert (after.method, after.crf, after.min_peak, after.expand, after.blur, after.fill, after.components) == ("threshold", False, 0.0, 1.2, 0.02, True, 2)


@pytest.mark.parametrize("method", ["threshold", "otsu", "kmeans"])
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
        ({"method": "crf"}, "threshold, otsu, kmeans"),
        ({"blur": 0}, r"blur must be a share of the image's edge in \(0, 0.5\]"),
        ({"blur": 0.1, "soft": True}, "one of blur and soft"),
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
