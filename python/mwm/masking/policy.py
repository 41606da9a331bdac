"""What every masking policy is: a frozen set of settings and a pure function from regions to visible patches."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mwm.masking.coverage import MIN_COVER, check_grid, inside_grid, split_maps

_ID_LIMIT = 2**32


@dataclass(frozen=True)
class MaskRequest:
    """Whose masks are drawn: everything a mask depends on besides the region and the policy's settings.

    Attributes:
        grid: Patches along height and width.
        seed: Seed of the run.
        ids: Image ids in [0, 2^32). int64 [B]
        epoch: Epoch, from 0.
        view: Number of the view of the same image in the same epoch, from 0.
        foreground: Patches that are not air, where the caller gave a second map. bool [B, Gh, Gw], or None
    """

    grid: tuple[int, int]
    seed: int
    ids: Tensor
    epoch: int
    view: int = 0
    foreground: Tensor | None = None

    @property
    def patches(self) -> int:
        """Number of patches of one image, L."""
        return self.grid[0] * self.grid[1]

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `mwm.ops.sample_active`."""
        return {"grid": self.grid, "seed": self.seed, "ids": self.ids, "epoch": self.epoch, "view": self.view}


class Policy(abc.ABC):
    """Base of the masking policies. A subclass is a frozen dataclass with a `name` and three methods.

    `draw` makes the masks; `hidden_share` says which share of each image it hides on average; `visible` (only where it
    is constant) says how many patches it leaves. The base checks every argument, so that a subclass only draws.
    """

    name: ClassVar[str]
    min_cover: float = MIN_COVER

    def __call__(self, region: Tensor | None, *, grid: tuple[int, int], seed: int, ids: Any, epoch: int, view: int = 0) -> Tensor:
        """Draw one mask per image; a pure function of its arguments.

        Args:
            region: Region of each image, in [0, 1]. float [B, H, W]; or the patches that are region, as `inside`
                returns them (what a data-loader worker sends). bool [B, Gh, Gw]. None for policies that read no region.
                With a dimension more, [B, 2, …], the second map is the foreground (what is not air); only "foreground" reads it.
            grid: Patches along height and width, (Gh, Gw).
            seed: Seed of the run.
            ids: Image ids in [0, 2^32). integer [B]
            epoch: Epoch, from 0.
            view: Number of the view of the same image, from 0.

        Returns:
            True where a patch is visible. bool [B, Gh, Gw]

        Raises:
            ValueError: the region, the grid and the ids do not fit; the message names both sides.
        """
        grid = check_grid(grid, self.name)
        if region is None and self.needs_region:
            raise ValueError(f"{self.name}: region must be [B, H, W], got None. Pass the regions of the images, or use the uniform policy.")
        device = region.device if region is not None else (ids.device if isinstance(ids, Tensor) else torch.device("cpu"))
        request = MaskRequest(grid, check_whole(seed, "seed", self.name), check_ids(ids, device, self.name),
                              check_whole(epoch, "epoch", self.name), check_whole(view, "view", self.name))
        inside = share = None
        if region is not None and self.needs_region:
            region, foreground = split_maps(region, self.name)
            inside, share = inside_grid(region, grid, min_cover=self.min_cover, name=self.name)
            if foreground is not None and self.needs_foreground:
                request = dataclasses.replace(request, foreground=inside_grid(foreground, grid, min_cover=self.min_cover, name=self.name)[0])
            if inside.shape[0] != request.ids.shape[0]:
                raise ValueError(f"{self.name}: ids must be [B] with B = {inside.shape[0]} (the regions), got {request.ids.shape[0]} ids. Pass one id per image.")
        return self.draw(inside, share, request)

    @abc.abstractmethod
    def draw(self, inside: Tensor | None, share: Tensor | None, request: MaskRequest) -> Tensor:
        """Draw the masks of checked arguments.

        Args:
            inside: Patches that are region. bool [B, Gh, Gw], or None where `needs_region` is False.
            share: Covered share of each patch, in [0, 1]. float64 [B, Gh, Gw], or None where only `inside` was given.
            request: Ids, seed, epoch, view and grid.

        Returns:
            True where a patch is visible. bool [B, Gh, Gw]
        """

    @abc.abstractmethod
    def hidden_share(self, inside: Tensor) -> Tensor:
        """Expected share of each image that the policy hides. bool [B, Gh, Gw] → float64 [B]"""

    @property
    def needs_region(self) -> bool:
        """Whether the masks depend on the region."""
        return True

    @property
    def needs_foreground(self) -> bool:
        """Whether the masks depend on a second map, that of what is not air."""
        return False

    def visible(self, grid: tuple[int, int]) -> int | None:
        """Number of visible patches per image where it is the same for every image, else None."""
        check_grid(grid, self.name)
        return None

    def inside(self, region: Tensor, grid: tuple[int, int]) -> Tensor:
        """The patches that are region: all that the policy reads of a region. float [B, H, W] → bool [B, Gh, Gw], or [B, 2, …] → [B, 2, …]"""
        maps = [inside_grid(one, check_grid(grid, self.name), min_cover=self.min_cover, name=self.name)[0] for one in split_maps(region, self.name) if one is not None]
        return torch.stack(maps, 1) if len(maps) > 1 else maps[0]

    def mean_share(self, inside: Tensor) -> float:
        """Mean expected hidden share of the images whose region is not empty.

        Args:
            inside: Patches that are region, over the whole data set. bool [N, Gh, Gw]

        Returns:
            Share in [0, 1).

        Raises:
            ValueError: every region is empty, so that there is nothing to average.
        """
        found = inside[inside.flatten(1).any(1)]
        if not len(found):
            raise ValueError(f"{self.name}: at least one region must be non-empty, got {len(inside)} empty ones. Change the prompt, or use the uniform policy.")
        return math.fsum(self.hidden_share(found).tolist()) / len(found)  # fsum: no order of the images changes the last bit

    def with_empty_share(self, share: float) -> Policy:
        """The same policy, hiding this share of images whose region is empty; itself where no region is read."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Name and settings as plain values for a config file; `policy_from_dict` reads them back."""
        settings: dict[str, Any] = {"name": self.name}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            settings[field.name] = value.to_dict() if isinstance(value, Policy) else value
        return settings


def check_ratio(value: Any, argument: str, policy: str) -> float:
    """The ratio as a float; refuses what is not in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{policy}: {argument} must be a number in [0, 1), got {value!r}. Give the share of patches to hide, for example 0.6.")
    if not 0 <= value < 1:  # also refuses NaN
        raise ValueError(f"{policy}: {argument} must be in [0, 1), got {value}. Give the share of patches to hide, for example 0.6.")
    return float(value)


def check_whole(value: Any, argument: str, policy: str, least: int = 0) -> int:
    """The whole number as an int; refuses what is none, or is below `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{policy}: {argument} must be a whole number, got {value!r}.")
    if value.__index__() < least:
        raise ValueError(f"{policy}: {argument} must be at least {least}, got {value}.")
    return value.__index__()


def check_ids(ids: Any, device: torch.device, policy: str) -> Tensor:
    """The ids as int64 [B] on the device; refuses what is not in [0, 2^32)."""
    if not isinstance(ids, Tensor):
        if not isinstance(ids, Iterable):
            raise TypeError(f"{policy}: ids must be one integer per image, [B], got {ids!r}.")
        ids = torch.tensor([check_whole(i, "each id", policy) for i in ids], dtype=torch.int64)
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{policy}: ids must be integers [B], got {ids.dtype} {list(ids.shape)}. Pass one integer id per image.")
    ids = ids.to(torch.int64)
    # Ids on a GPU are not looked at here: a look would wait for the device.
    if ids.device.type == "cpu" and ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < _ID_LIMIT):
        raise ValueError(f"{policy}: ids must be in [0, 2^32), got {int(ids.min())} … {int(ids.max())}. Hash longer ids to 32 bits.")
    return ids.to(device, non_blocking=True)
