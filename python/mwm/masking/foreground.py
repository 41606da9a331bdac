"""`foreground`: hide patches that are not air uniformly, as many as another policy hides; what guided masking owes to leaving out air."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mwm.masking.policy import MaskRequest, Policy
from mwm.masking.region import RegionPolicy
from mwm.masking.registry import register_policy
from mwm.ops import sample_active


@register_policy
@dataclass(frozen=True)
class ForegroundPolicy(Policy):
    """Hide foreground patches uniformly at random; of air only what does not fit into the foreground.

    A mask hides, image by image, epoch by epoch and view by view, exactly as many patches as `match` does: K = hidden patches of `match`,
    of which min(K, n) among the n foreground patches and the rest among the others. A patch is foreground as it is region, from `min_cover` on, by the
    second map of [B, 2, H, W]. Without that map every patch counts as foreground, which is the uniform policy with `match`.

    Attributes:
        match: The policy whose counts are taken; region 0.8 / 0.4 where left out.
    """

    name: ClassVar[str] = "foreground"

    match: Policy = field(default_factory=RegionPolicy)

    def __post_init__(self) -> None:
        if not isinstance(self.match, Policy):
            raise TypeError(f"foreground: match must be a policy, got {type(self.match).__name__}. Build it with create_policy(...).")
        if self.match.needs_foreground:
            raise ValueError("foreground: match must be a policy that reads no foreground itself, got another foreground policy. Match the region policy.")

    @property
    def min_cover(self) -> float:  # type: ignore[override]
        """Covered share from which a patch counts as region of `match`, and as foreground."""
        return self.match.min_cover

    @property
    def needs_foreground(self) -> bool:
        """Always: the second map."""
        return True

    def visible(self, grid: tuple[int, int]) -> int | None:
        """That of the matched policy."""
        return self.match.visible(grid)

    def draw(self, inside: Tensor | None, share: Tensor | None, request: MaskRequest) -> Tensor:
        """Hide patches of two strata, foreground and air."""
        total = (~self.match.draw(inside, share, request)).flatten(1).sum(1)
        if request.foreground is None:
            strata = torch.ones((len(total), request.patches), dtype=torch.int64, device=total.device)
        else:
            strata = request.foreground.flatten(1).to(torch.int64)
        fore = torch.minimum(total, strata.sum(1))
        return sample_active(strata, hidden=torch.stack([total - fore, fore], 1), num_strata=2, **request.options())

    def hidden_share(self, inside: Tensor) -> Tensor:
        """The matched policy's shares. bool [B, Gh, Gw] → float64 [B]"""
        return self.match.hidden_share(inside)

    def with_empty_share(self, share: float) -> ForegroundPolicy:
        """Hands the share on to the matched policy."""
        return dataclasses.replace(self, match=self.match.with_empty_share(share))
