"""`region`: hide a high share of the patches that the text names and a low share of the rest (Mask What Matters, §3)."""

from __future__ import annotations

import dataclasses
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mwm.masking.coverage import MIN_COVER, check_grid
from mwm.masking.policy import MaskRequest, Policy, check_ids, check_ratio
from mwm.masking.registry import register_policy
from mwm.ops import random_words, region_active, sample_active, to_q32

PRESETS = {"0.8/0.4": (0.8, 0.4), "0.7/0.3": (0.7, 0.3), "0.6/0.2": (0.6, 0.2)}
"""High and low share of the paper's three settings, by name."""

_COUNT_STREAM = 64  # random words of the fractional region patch under `overall`; apart from those of the keys
_LEAST_WEIGHT = 1 / 16  # under `soft`, so that a patch without coverage is not always hidden last
_EMPTY = ("mean", "low", "error")
_OUTSIDE, _INSIDE, _WITHOUT = 0, 1, 2  # strata; _WITHOUT: patches of an image whose region is empty


@register_policy
@dataclass(frozen=True)
class RegionPolicy(Policy):
    """Hide region patches at `high` and the others at `low`, or at `high` under a fixed overall count.

    Inside n region patches, floor(n·high) are hidden, plus one with probability frac(n·high): every region patch is
    hidden with probability `high`, whatever n. With `overall`, every image hides exactly K = round(overall · L)
    patches: inside at `high` as far as K and the image allow (clamped to [max(0, K − n_out), min(n_in, K)]), the rest
    outside.

    An image whose region is empty must not be recognisable by its hidden share (it would tell the disease label):
    by default it is hidden uniformly at the mean share of the images that have a region, `empty_share`, computed once
    over the data set by `mean_share` and set by `with_empty_share`.

    Attributes:
        high: Share of region patches to hide, in [0, 1).
        low: Share of the other patches to hide, in [0, 1); not given with `overall`.
        overall: Share of all patches to hide, in [0, 1), exact in every image; None for `high` / `low`.
        min_cover: Covered share from which a patch is region, in (0, 1]; a region that reaches no patch claims one.
        empty: "mean" (see above), "low" (hide at `low`) or "error", for images whose region is empty.
        empty_share: Share of patches to hide where the region is empty and `empty` is "mean".
        soft: Draw patches inside a stratum in proportion to their covered share (at least 1/16): counts stay exact, the
            better covered patches are hidden more often. Needs float regions.
        preset: Name of a pair high/low in `PRESETS`; used when nothing else is given: "0.8/0.4".
    """

    name: ClassVar[str] = "region"

    high: float | None = None
    low: float | None = None
    overall: float | None = None
    min_cover: float = MIN_COVER
    empty: str = "mean"
    empty_share: float | None = None
    soft: bool = False
    preset: InitVar[str | None] = None

    def __post_init__(self, preset: str | None) -> None:
        high, low = self._resolve(preset)
        for argument, value in (("high", high), ("low", low), ("overall", self.overall), ("empty_share", self.empty_share)):
            if value is not None:
                object.__setattr__(self, argument, check_ratio(value, argument, self.name))
        if self.low is not None and self.high < self.low:
            raise ValueError(f"region: high must be at least low, got high={high} and low={low}. Swap them, or pass 1 - region to hide the background more.")
        if isinstance(self.min_cover, bool) or not isinstance(self.min_cover, (int, float)) or not 0 < self.min_cover <= 1:
            raise ValueError(f"region: min_cover must be in (0, 1], got {self.min_cover!r}. The default is {MIN_COVER}.")
        if self.empty not in _EMPTY:
            raise ValueError(f"region: empty must be one of {', '.join(_EMPTY)}, got {self.empty!r}.")
        if self.overall is not None and self.empty == "low":
            raise ValueError('region: empty must be "mean" or "error" where overall is given, got "low". With overall every image hides the same count.')

    def _resolve(self, preset: str | None) -> tuple[float, float | None]:
        """High and low from the settings that were given."""
        high, low = self.high, self.low
        if preset is not None:
            if high is not None or low is not None or self.overall is not None:
                raise ValueError(f"region: preset must be given alone, got preset={preset!r} and high, low or overall. Leave one of them out.")
            if not isinstance(preset, str) or preset not in PRESETS:
                raise ValueError(f"region: preset must be one of {', '.join(PRESETS)}, got {preset!r}. Other shares: high=…, low=….")
            return PRESETS[preset]
        if self.overall is not None:
            if low is not None:
                raise ValueError(f"region: low must not be given with overall, got low={low} and overall={self.overall}. "
                                 "With overall the share outside follows from the count; leave low out.")
            return (PRESETS["0.8/0.4"][0] if high is None else high), None
        if high is None and low is None:
            return PRESETS["0.8/0.4"]
        if high is None or low is None:
            raise ValueError(f"region: high and low must be given together, got high={high} and low={low}. Give both, or overall=….")
        return high, low

    def visible(self, grid: tuple[int, int]) -> int | None:
        """L − round(overall · L) with `overall`, else None: the count then depends on the region."""
        super().visible(grid)
        if self.overall is None:
            return None
        return grid[0] * grid[1] - round(self.overall * grid[0] * grid[1])

    def __call__(self, region: Tensor | None, *, grid: tuple[int, int], seed: int, ids: Any, epoch: int, view: int = 0) -> Tensor:
        """As `Policy`; on a GPU in one launch where regions and ids alone decide."""
        grid = check_grid(grid, self.name)
        plain = isinstance(region, Tensor) and isinstance(ids, Tensor) and all(isinstance(number, int) for number in (seed, epoch, view))
        if plain and region.device.type == "cuda" and self._one_launch_draws(region, grid, ids):
            return self._draw_at_once(region, grid, seed, ids, epoch, view)
        return super().__call__(region, grid=grid, seed=seed, ids=ids, epoch=epoch, view=view)

    def _one_launch_draws(self, region: Tensor, grid: tuple[int, int], ids: Tensor) -> bool:
        """False also for what does not fit: the steps say why."""
        settled = not self.soft and self.empty != "error" and (self.overall is not None or self._share_without_region() is not None)
        if not settled or region.ndim != 3 or not region.is_floating_point() or ids.shape != region.shape[:1]:
            return False
        height, width = region.shape[1:]
        return height % grid[0] == 0 == width % grid[1] and height // grid[0] == width // grid[1] > 0

    def _draw_at_once(self, region: Tensor, grid: tuple[int, int], seed: int, ids: Any, epoch: int, view: int) -> Tensor:
        """The masks of the steps, in one launch on a GPU."""
        hidden = None if self.overall is None else round(self.overall * grid[0] * grid[1])
        ratio = [int(to_q32(share or 0.0)) for share in (self.low, self.high, self._share_without_region())]
        settings = {"seed": seed, "ids": check_ids(ids, region.device, self.name), "epoch": epoch, "view": view}
        return region_active(region, tuple(grid), ratio, hidden=hidden, stream=_COUNT_STREAM, min_cover=self.min_cover, **settings)[0]

    def draw(self, inside: Tensor | None, share: Tensor | None, request: MaskRequest) -> Tensor:
        """Hide patches of the strata region and rest; an image with an empty region is a stratum of its own."""
        inside = inside.flatten(1)
        found = inside.any(1)
        self._check_empty(found)
        weights = self._weights(share)
        if self.overall is not None:
            hidden = self._counts(inside, request)
            return sample_active(inside.to(torch.int64), hidden=hidden, num_strata=2, weights=weights, **request.options())
        strata = torch.where(found[:, None], inside.to(torch.int64), _WITHOUT)
        shares = [0.0] * 3
        shares[_OUTSIDE], shares[_INSIDE], shares[_WITHOUT] = self.low, self.high, self._share_without_region() or 0.0
        ratio = torch.tensor([int(to_q32(share)) for share in shares], dtype=torch.int64).to(inside.device, non_blocking=True)
        return sample_active(strata, ratio, num_strata=3, weights=weights, **request.options())

    def _counts(self, inside: Tensor, request: MaskRequest) -> Tensor:
        """Hidden patches outside and inside the region under a fixed overall count. bool [B, L] → int64 [B, 2]"""
        total = round(self.overall * request.patches)
        n_in = inside.sum(1)
        exact = n_in * int(to_q32(self.high))
        word = random_words(request.seed, request.ids, request.epoch, request.view, _COUNT_STREAM, 1)[:, 0]
        wanted = (exact >> 32) + (word < (exact & 0xFFFFFFFF)).to(torch.int64)
        hidden_in = torch.minimum(torch.maximum(wanted, total - (request.patches - n_in)), n_in.clamp(max=total))
        return torch.stack([total - hidden_in, hidden_in], dim=1)

    def _weights(self, share: Tensor | None) -> Tensor | None:
        if not self.soft:
            return None
        if share is None:
            raise ValueError("region: region must be float [B, H, W] with soft=True, got an inside grid, which has no coverage. Pass the regions, or soft=False.")
        return share.flatten(1).clamp(min=_LEAST_WEIGHT)

    def _share_without_region(self) -> float | None:
        return self.low if self.empty == "low" else self.empty_share

    def _check_empty(self, found: Tensor) -> None:
        """Refuse empty regions where nothing says what to do with them."""
        if self.empty == "error":
            text = 'region: region must not be empty with empty="error". Change the prompt, leave those images out, or use empty="mean".'
        elif self.overall is None and self._share_without_region() is None:
            text = ('region: empty_share must be set where a region is empty. Use policy.with_empty_share(policy.mean_share(inside)) with the inside grids '
                    'of the data set, or empty="low", or empty="error".')
        else:
            return
        if found.device.type == "cpu":
            if not bool(found.all()):
                missing = int((~found).sum())
                raise ValueError(f"{text} ({missing} of {len(found)} regions of this batch are empty.)")
        else:
            torch._assert_async(found.all(), text)  # a look from the host would wait for the device

    def hidden_share(self, inside: Tensor) -> Tensor:
        """Expected hidden share of each image. bool [B, Gh, Gw] → float64 [B]"""
        patches = inside.shape[1] * inside.shape[2]
        n_in = inside.flatten(1).sum(1).double()
        if self.overall is not None:
            return torch.full((len(inside),), round(self.overall * patches) / patches, dtype=torch.float64, device=inside.device)
        share = (n_in * self.high + (patches - n_in) * self.low) / patches
        without = self._share_without_region()
        return torch.where(n_in > 0, share, float("nan") if without is None else without)

    def with_empty_share(self, share: float) -> RegionPolicy:
        """The same policy, hiding `share` of the patches of images whose region is empty."""
        return dataclasses.replace(self, empty_share=share)
