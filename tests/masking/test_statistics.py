"""The figures that preview and pretrain print, and when they warn."""

from __future__ import annotations

import pytest
import torch

from mwm.masking import create_policy, format_statistics, region_statistics, stack_inside, survey_regions

GRID = (7, 7)


def box(top: int, left: int, height: int, width: int, size: int = 224) -> torch.Tensor:
    region = torch.zeros(size, size)
    region[top : top + height, left : left + width] = 1
    return region


def test_figures_of_a_known_set() -> None:
    regions = torch.stack([box(0, 0, 64, 64)] * 6 + [box(0, 0, 0, 0)] * 2 + [torch.ones(224, 224)] * 2)
    found = region_statistics(regions, create_policy("region", high=0.8, low=0.4), grid=GRID)
    assert found.images == 10 and found.patches == (0, 4.0, (6 * 4 + 2 * 49) / 10, 49)
    assert found.empty == pytest.approx(0.2) and found.full == pytest.approx(0.2) == found.many
    assert found.hidden_inside == pytest.approx(0.8, abs=0.05)
    assert found.hidden_outside == pytest.approx(0.4, abs=0.02)
    assert found.hidden_without_region == pytest.approx(found.hidden_with_region, abs=0.02)
    assert not found.warnings


def test_hidden_shares_are_those_of_the_masks() -> None:
    policy = create_policy("region", high=0.7, low=0.3)
    inside = torch.rand(50, 7, 7, generator=torch.Generator().manual_seed(0)) < 0.3
    ids = torch.arange(50) * 31
    hidden = ~policy(inside, grid=GRID, seed=9, ids=ids, epoch=4)
    found = region_statistics(inside, policy, grid=GRID, ids=ids, seed=9, epoch=4)
    assert found.hidden == hidden.double().mean().item()
    assert found.hidden_inside == hidden[inside].double().mean().item()
    assert found.hidden_outside == hidden[~inside].double().mean().item()


def test_regions_inside_grids_and_streams_give_the_same_figures() -> None:
    regions = [box(10 * i, 5 * i, 20 + 6 * i, 60) for i in range(12)]
    policy = create_policy("region", high=0.8, low=0.4)
    whole = format_statistics(region_statistics(torch.stack(regions), policy, grid=GRID))
    for same in (iter(regions), survey_regions(regions, GRID), stack_inside(regions, GRID, policy)):
        assert format_statistics(region_statistics(same, policy, grid=GRID)) == whole


def test_regions_of_different_image_sizes_can_be_surveyed() -> None:
    survey = survey_regions([box(0, 0, 64, 64), box(0, 0, 128, 128, size=448)], GRID)
    assert torch.equal(survey.inside[0], survey.inside[1])
    assert survey.area.tolist() == [4.0, 4.0]


def test_boxes_that_cover_almost_everything_are_warned_about_with_the_remedy() -> None:
    found = region_statistics(torch.stack([box(10, 10, 200, 200)] * 4), create_policy("region"), grid=GRID)
    assert any("tight mask instead of a box" in warning and "finer grid" in warning for warning in found.warnings)
    assert "warning:" in format_statistics(found)


def test_regions_smaller_than_a_patch_are_warned_about_with_the_remedy() -> None:
    found = region_statistics(torch.stack([box(40, 40, 12, 12)] * 2 + [box(0, 0, 64, 64)] * 4), create_policy("region"), grid=GRID)
    assert found.empty == 0 and found.few == pytest.approx(1 / 3)
    assert any("smaller than one patch" in warning and "larger images" in warning for warning in found.warnings)
    finer = region_statistics(torch.stack([box(40, 40, 12, 12)] * 2 + [box(0, 0, 64, 64)] * 4), create_policy("region"), grid=(28, 28))
    assert not finer.warnings


def test_many_empty_regions_are_warned_about() -> None:
    found = region_statistics(torch.stack([box(0, 0, 0, 0)] * 2 + [box(0, 0, 64, 64)] * 4), create_policy("region"), grid=GRID)
    assert any("reword the prompt" in warning for warning in found.warnings)


def test_empty_and_tiny_regions_count_together() -> None:
    found = region_statistics(torch.stack([box(0, 0, 0, 0)] * 2 + [box(40, 40, 9, 9)] * 2 + [box(0, 0, 64, 64)] * 6), create_policy("region"), grid=GRID)
    assert found.empty == pytest.approx(0.2) and found.few == pytest.approx(0.4) and len(found.warnings) == 1


def test_a_quarter_of_the_images_is_tolerated() -> None:
    regions = torch.stack([box(0, 0, 0, 0), torch.ones(224, 224), box(0, 0, 64, 64), box(0, 0, 64, 64)])
    assert not region_statistics(regions, create_policy("region"), grid=GRID).warnings


@pytest.mark.parametrize("settings", [("uniform", {"mask_ratio": 0.6}), ("region", {"overall": 0.6}), ("region", {"soft": True})])
def test_every_kind_of_policy_can_be_counted(settings: tuple[str, dict]) -> None:
    policy = create_policy(settings[0], **settings[1])
    inside = torch.rand(40, 7, 7, generator=torch.Generator().manual_seed(1)) < 0.2
    inside[0] = False
    text = format_statistics(region_statistics(inside, policy, grid=GRID))
    assert "inside" in text and "outside" in text and "overall" in text and "nan" not in text


def test_text_states_what_the_user_needs() -> None:
    text = format_statistics(region_statistics(torch.stack([box(0, 0, 64, 64)] * 3 + [box(0, 0, 0, 0)]), create_policy("region"), grid=GRID))
    assert "4 images, grid 7x7" in text and "empty regions 25.0 %" in text and "full regions 0.0 %" in text


def test_regions_that_are_all_empty_end_in_a_sentence_on_the_prompt() -> None:
    with pytest.raises(ValueError, match=r"got 3 empty ones\. Change the prompt"):
        region_statistics(torch.zeros(3, 224, 224), create_policy("region"), grid=GRID)


def test_no_images_and_wrong_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        region_statistics([], create_policy("region"), grid=GRID)
    with pytest.raises(ValueError, match="3 ids for 2 regions"):
        region_statistics(torch.zeros(2, 224, 224), create_policy("uniform"), grid=GRID, ids=[1, 2, 3])
