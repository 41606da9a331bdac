"""`uniform`: every patch is hidden with the same probability, as in MAE and SparK; the arm to compare regions with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mwm.masking.policy import MaskRequest, Policy, check_ratio
from mwm.masking.registry import register_policy
from mwm.ops import sample_active, to_q32


@register_policy
@dataclass(frozen=True)
class UniformPolicy(Policy):
    """Hide patches uniformly at random; exactly one of the three settings says how many.

    With `match`, a uniform mask and the other policy's mask of the same image and epoch differ only in *which* patches
    are hidden, never in how many: the comparison that guided masking has to win (same effective ratio, same number of
    visible patches).

    Attributes:
        mask_ratio: Share of hidden patches in [0, 1): floor(r L) or one more, such that the expectation is exact.
        overall: Share of hidden patches in [0, 1): exactly round(r L) in every image, so that `visible` is known.
        match: Another policy; hides per image, epoch and view exactly as many patches as that policy does.
    """

    name: ClassVar[str] = "uniform"

    mask_ratio: float | None = None
    overall: float | None = None
    match: Policy | None = None

    def __post_init__(self) -> None:
        if self.mask_ratio is None and self.overall is None and self.match is None:
            object.__setattr__(self, "mask_ratio", 0.6)
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]
        if len(given) > 1:
            raise ValueError(f"uniform: exactly one of mask_ratio, overall, match must be given, got {' and '.join(given)}. Leave all but one out.")
        if self.match is not None and not isinstance(self.match, Policy):
            raise TypeError(f"uniform: match must be a policy, got {type(self.match).__name__}. Build it with create_policy(...).")
        if self.mask_ratio is not None:
            object.__setattr__(self, "mask_ratio", check_ratio(self.mask_ratio, "mask_ratio", self.name))
        if self.overall is not None:
            object.__setattr__(self, "overall", check_ratio(self.overall, "overall", self.name))

    @property
    def min_cover(self) -> float:  # type: ignore[override]
        """Covered share from which the matched policy counts a patch as region."""
        return self.match.min_cover if self.match is not None else Policy.min_cover

    @property
    def needs_region(self) -> bool:
        """Only where the matched policy reads regions."""
        return self.match is not None and self.match.needs_region

    def visible(self, grid: tuple[int, int]) -> int | None:
        """Visible patches per image, where constant: with `overall`, or where the matched policy's count is."""
        super().visible(grid)
        if self.match is not None:
            return self.match.visible(grid)
        patches = grid[0] * grid[1]
        if self.overall is not None:
            return patches - round(self.overall * patches)
        hidden, fraction = divmod(int(to_q32(self.mask_ratio)) * patches, 2**32)
        return patches - hidden if fraction == 0 else None

    def draw(self, inside: Tensor | None, share: Tensor | None, request: MaskRequest) -> Tensor:
        """Hide patches of one stratum, the whole image."""
        device, batch = request.ids.device, request.ids.shape[0]
        strata = torch.zeros((batch, request.patches), dtype=torch.int64, device=device)
        if self.mask_ratio is not None:
            ratio = torch.full((1,), int(to_q32(self.mask_ratio)), dtype=torch.int64, device=device)
            return sample_active(strata, ratio, num_strata=1, **request.options())
        if self.match is not None:
            hidden = (~self.match.draw(inside, share, request)).flatten(1).sum(1, keepdim=True)
        else:
            count = round(self.overall * request.patches)
            hidden = torch.full((batch, 1), count, dtype=torch.int64, device=device)
        return sample_active(strata, hidden=hidden, num_strata=1, **request.options())

    def hidden_share(self, inside: Tensor) -> Tensor:
        """The ratio for every image, or the matched policy's shares. bool [B, Gh, Gw] → float64 [B]"""
        if self.match is not None:
            return self.match.hidden_share(inside)
        patches = inside.shape[1] * inside.shape[2]
        share = self.mask_ratio if self.mask_ratio is not None else round(self.overall * patches) / patches
        return torch.full((len(inside),), share, dtype=torch.float64, device=inside.device)

    def with_empty_share(self, share: float) -> UniformPolicy:
        """Hands the share on to the matched policy."""
        if self.match is None:
            return self
        return dataclasses.replace(self, match=self.match.with_empty_share(share))
