"""From a region on pixels to the patches that are region, for one batch or for a whole data set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mwm.ops import region_coverage

MIN_COVER = 0.25
"""A patch is region from this covered share on; a 0.5 threshold leaves 57 % of brain tumours without a patch (7x7)."""

_FULL = 255  # coverage counts a fully covered pixel as 255


def check_grid(grid: Any, name: str) -> tuple[int, int]:
    """The grid as a pair of positive integers; refuses anything else."""
    try:
        height, width = (int(edge.__index__()) for edge in grid)
    except (TypeError, ValueError, AttributeError):
        raise TypeError(f"{name}: grid must be two whole numbers (Gh, Gw), got {grid!r}. Divide the image's height and width by the patch size.") from None
    if height < 1 or width < 1:
        raise ValueError(f"{name}: grid must have at least one patch along height and width, got {(height, width)}.")
    return height, width


def split_maps(region: Any, name: str = "masking") -> tuple[Any, Tensor | None]:
    """Region and foreground of what a data set gives: [B, …] → itself and None; [B, 2, …] → both.

    Raises:
        ValueError: there is another number of maps.
    """
    if not isinstance(region, Tensor) or region.ndim != 4:
        return region, None
    if region.shape[1] != 2:
        raise ValueError(f"{name}: region must be [B, H, W], or [B, 2, H, W] with the foreground as the second map, got {list(region.shape)}. "
                         "Drop the channel dimension.")
    return region[:, 0], region[:, 1]


def inside_grid(region: Tensor, grid: tuple[int, int], *, min_cover: float = MIN_COVER, name: str = "masking") -> tuple[Tensor, Tensor | None]:
    """Bring regions to the patch grid.

    Args:
        region: Regions in [0, 1]. float [B, H, W], or bool [B, H, W]; a bool tensor of the grid's size is taken as the
            answer itself (with patches of one pixel both readings agree).
        grid: Patches along height and width.
        min_cover: Covered share from which a patch counts as region, in (0, 1].
        name: Who asks, for error texts.

    Returns:
        The patches that are region, bool [B, Gh, Gw], and the covered share of every patch, float64 [B, Gh, Gw], or
        None where an inside grid was given.

    Raises:
        ValueError: size and grid do not fit, or a value is NaN; the message names both sizes.
    """
    if not isinstance(region, Tensor):
        raise TypeError(f"{name}: region must be a tensor [B, H, W], got {type(region).__name__}.")
    if region.ndim != 3:
        raise ValueError(f"{name}: region must be [B, H, W], got {list(region.shape)}. Drop the channel dimension, or add the batch dimension.")
    height, width = region.shape[1:]
    if region.dtype == torch.bool:
        if (height, width) == tuple(grid):
            return region, None
        region = region.to(torch.float32)
    if not region.is_floating_point():
        raise TypeError(f"{name}: region must be float in [0, 1] or bool, got {region.dtype}. Divide a 0 … 255 mask by 255.")
    if height % grid[0] or width % grid[1] or height // grid[0] != width // grid[1] or not height:
        raise ValueError(f"{name}: region must divide into square patches on the grid {grid[0]}x{grid[1]}, got a region of {height}x{width} pixels. "
                         "Give the region the size of the image, and grid = image size / patch size.")
    inside, cover = region_coverage(region, grid, min_cover=min_cover)
    return inside, cover.double() / (_FULL * (height // grid[0]) * (width // grid[1]))


@dataclass(frozen=True)
class RegionSurvey:
    """What the policies and the statistics need to know of the regions of a whole data set.

    Attributes:
        inside: Patches that are region. bool [N, Gh, Gw]
        share: Covered share of every patch. float64 [N, Gh, Gw]
        foreground: Patches that are not air, where there is a second map. bool [N, Gh, Gw], or None
    """

    inside: Tensor
    share: Tensor
    foreground: Tensor | None = None

    @property
    def area(self) -> Tensor:
        """Area of each region, in patches. float64 [N]"""
        return self.share.flatten(1).sum(1)


def survey_regions(regions: Iterable[Tensor], grid: tuple[int, int], *, min_cover: float = MIN_COVER) -> RegionSurvey:
    """Read the regions of a data set one by one; only their patch grids stay in memory.

    Args:
        regions: Regions in [0, 1]. float [H, W] each, or [2, H, W] with the foreground as second map; sizes may differ as long as each divides
            into the grid
        grid: Patches along height and width.
        min_cover: Covered share from which a patch counts as region.

    Returns:
        Patches and covered shares of every region, in the order given.
    """
    grid = check_grid(grid, "survey_regions")
    grids, shares, fores = [], [], []
    for region in regions:
        region, foreground = split_maps(region[None], "survey_regions")
        inside, share = inside_grid(region, grid, min_cover=min_cover, name="survey_regions")
        if foreground is not None:
            fores.append(inside_grid(foreground, grid, min_cover=min_cover, name="survey_regions")[0])
        grids.append(inside)
        shares.append(inside.double() if share is None else share)
    if not grids:
        return RegionSurvey(torch.zeros((0, *grid), dtype=torch.bool), torch.zeros((0, *grid), dtype=torch.float64))
    return RegionSurvey(torch.cat(grids), torch.cat(shares), torch.cat(fores) if fores else None)


def stack_inside(regions: Iterable[Tensor], grid: tuple[int, int], policy: Any = None) -> Tensor:
    """The patches that are region, for a whole data set. Iterable of float [H, W] → bool [N, Gh, Gw]

    `policy` gives the covered share from which a patch counts (its `min_cover`).
    """
    return survey_regions(regions, grid, min_cover=getattr(policy, "min_cover", MIN_COVER)).inside
