"""What a policy does to a data set: region patches per image, empty and full regions, realised hidden shares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mwm.masking.coverage import RegionSurvey, check_grid, inside_grid, survey_regions
from mwm.masking.policy import MaskRequest, Policy, check_ids

FEW = 1
"""An image with a region of fewer patches than this has nothing that guided masking could hide."""
MANY = 0.7
"""An image with a larger share of region patches is masked almost uniformly."""
TOLERATED = 0.25
"""Share of images that may be so before a warning is given."""

_CHUNK = 4096  # images whose masks are drawn at once


@dataclass(frozen=True)
class RegionStatistics:
    """Figures over a data set; shares are in [0, 1] and NaN where there is nothing to count.

    Attributes:
        images: Number of images.
        grid: Patches along height and width.
        patches: Least, median, mean and largest number of region patches per image.
        empty: Share of images whose region is empty.
        full: Share of images all of whose patches are region.
        few: Share of images whose region is smaller than one patch (empty ones included).
        many: Share of images with more than 70 % of their patches in the region.
        hidden_inside: Hidden share of the region patches.
        hidden_outside: Hidden share of the other patches, of images that have a region.
        hidden: Hidden share of all patches.
        hidden_with_region: Hidden share of the images that have a region.
        hidden_without_region: Hidden share of the images whose region is empty.
        warnings: What is wrong and what to do about it, one sentence each.
    """

    images: int
    grid: tuple[int, int]
    patches: tuple[int, float, float, int]
    empty: float
    full: float
    few: float
    many: float
    hidden_inside: float
    hidden_outside: float
    hidden: float
    hidden_with_region: float
    hidden_without_region: float
    warnings: tuple[str, ...]


def region_statistics(
    regions: RegionSurvey | Tensor | Iterable[Tensor],
    policy: Policy,
    *,
    grid: tuple[int, int],
    ids: Tensor | Sequence[int] | None = None,
    seed: int = 0,
    epoch: int = 0,
) -> RegionStatistics:
    """Draw the masks of one epoch and count.

    Args:
        regions: The regions of the data set: what `survey_regions` returned; regions, float [N, H, W]; inside grids,
            bool [N, Gh, Gw]; or regions one by one, float [H, W] each.
        policy: The policy whose masks are counted. An empty share that is not set yet is computed here.
        grid: Patches along height and width.
        ids: Image ids; 0 … N − 1 where left out. integer [N]
        seed: Seed of the run.
        epoch: Epoch whose masks are drawn.

    Returns:
        The figures, with warnings where the regions do not suit the grid.

    Raises:
        ValueError: there is no image, every region is empty (with `empty="mean"`), or sizes do not fit the grid.
    """
    grid = check_grid(grid, "region_statistics")
    survey = _survey(regions, grid, policy)
    inside, count = survey.inside, len(survey.inside)
    if not count:
        raise ValueError("region_statistics: regions must hold at least one image, got none.")
    ids = check_ids(torch.arange(count) if ids is None else ids, inside.device, "region_statistics")
    if len(ids) != count:
        raise ValueError(f"region_statistics: ids must be one per region, got {len(ids)} ids for {count} regions.")
    n_in = inside.flatten(1).sum(1)
    if bool((n_in == 0).any()) and _lacks_share(policy, inside):
        policy = policy.with_empty_share(policy.mean_share(inside))
    parts = [slice(start, start + _CHUNK) for start in range(0, count, _CHUNK)]
    fore = survey.foreground if policy.needs_foreground else None
    hidden = torch.cat([~policy.draw(inside[part], survey.share[part], MaskRequest(grid, seed, ids[part], epoch, foreground=None if fore is None else fore[part]))
                        for part in parts])
    found = n_in > 0
    patches = grid[0] * grid[1]
    few = ((n_in < FEW) | (survey.area < FEW)).double().mean().item()
    many = (n_in > MANY * patches).double().mean().item()
    empty = (~found).double().mean().item()
    return RegionStatistics(
        images=count,
        grid=grid,
        patches=(int(n_in.min()), n_in.double().median().item(), n_in.double().mean().item(), int(n_in.max())),
        empty=empty,
        full=(n_in == patches).double().mean().item(),
        few=few,
        many=many,
        hidden_inside=_share(hidden, inside),
        hidden_outside=_share(hidden, ~inside & found[:, None, None]),
        hidden=_share(hidden, torch.ones_like(inside)),
        hidden_with_region=_share(hidden, found[:, None, None].expand_as(inside)),
        hidden_without_region=_share(hidden, (~found)[:, None, None].expand_as(inside)),
        warnings=_warnings(grid, empty, few, many),
    )


def format_statistics(statistics: RegionStatistics) -> str:
    """The figures as the lines that `mwm preview` and `mwm pretrain` print."""
    s = statistics
    low, median, mean, high = s.patches
    lines = [
        f"regions: {s.images} images, grid {s.grid[0]}x{s.grid[1]}; "
        f"region patches per image: median {median:.0f}, mean {mean:.1f}, from {low} to {high} of {s.grid[0] * s.grid[1]}",
        f"         empty regions {_percent(s.empty)}, full regions {_percent(s.full)} of the images",
        f"hidden:  inside {_percent(s.hidden_inside)}, outside {_percent(s.hidden_outside)}, overall {_percent(s.hidden)} of the patches",
    ]
    if 0 < s.empty < 1:
        lines.append(f"         images with a region {_percent(s.hidden_with_region)}, with an empty region {_percent(s.hidden_without_region)}")
    return "\n".join([*lines, *(f"warning: {warning}" for warning in s.warnings)])


def _survey(regions: RegionSurvey | Tensor | Iterable[Tensor], grid: tuple[int, int], policy: Policy) -> RegionSurvey:
    if isinstance(regions, RegionSurvey):
        return regions
    if isinstance(regions, Tensor) and regions.dtype == torch.bool:
        inside = inside_grid(regions, grid, min_cover=policy.min_cover, name="region_statistics")[0]
        return RegionSurvey(inside, inside.double())
    return survey_regions(regions, grid, min_cover=policy.min_cover)


def _lacks_share(policy: Policy, inside: Tensor) -> bool:
    """Whether the policy does not know yet how much to hide where the region is empty."""
    return policy.needs_region and bool(policy.hidden_share(inside).isnan().any())


def _share(hidden: Tensor, where: Tensor) -> float:
    total = int(where.sum())
    return int((hidden & where).sum()) / total if total else float("nan")


def _percent(share: float) -> str:
    return "–" if share != share else f"{100 * share:.1f} %"


def _warnings(grid: tuple[int, int], empty: float, few: float, many: float) -> tuple[str, ...]:
    size = f"{grid[0]}x{grid[1]}"
    found = []
    if few > TOLERATED:
        found.append(f"in {_percent(few)} of the images the region is smaller than one patch of the {size} grid ({_percent(empty)} are empty). "
                     "For small regions take a finer grid (smaller patch size) or larger images; for empty ones reword the prompt, "
                     "lower the threshold, or take another localizer (mwm preview shows them).")
    if many > TOLERATED:
        found.append(f"in {_percent(many)} of the images more than {MANY:.0%} of the {size} patches are region, so that masking is almost uniform. "
                     "Take a finer grid (smaller patch size), larger images, or a tight mask instead of a box (no box expansion).")
    return tuple(found)
