"""The first half of the demo: prompts, heat maps, regions, masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import mwm
from mwm.demo.scans import PROMPTS, TITLES, Scans, read_scans
from mwm.localize import RefineSettings, refine
from mwm.masking import Policy, region_statistics
from mwm.view import Cell, Chart, Sheet, heat_map, mask_picture, overlay, percent, picture, share_bars

XRAY_PROMPTS = ("left lung", "both lungs", "brain tumour")
SIZE, PATCH = 224, 32
REFINE = RefineSettings(threshold=0.5, components=2)
HIGH, LOW = 0.8, 0.4


@dataclass(frozen=True)
class Shown:
    """The scans on the page, one of each kind, with their regions.

    Attributes:
        kinds: brain_mri, chest_ct, chest_xray.
        images: [3, 1, H, W]
        maps: heat maps. [3, H, W]
        regions: [3, H, W]
        ids: [3]
    """

    kinds: list[str]
    images: Tensor
    maps: Tensor
    regions: Tensor
    ids: Tensor

    def labels(self) -> list[str]:
        """One line per scan."""
        return [f"{TITLES[kind]} · prompt “{PROMPTS[kind]}”" for kind in self.kinds]


def locate_shown(scans: Scans, localizer, size: int = SIZE) -> Shown:
    """Read the shown scans at `size` pixels and run the localizer on each with its prompt."""
    kinds = list(PROMPTS)
    records = [scans.shown(kind) for kind in kinds]
    images = read_scans(records, size)
    maps = localizer(images, [PROMPTS[kind] for kind in kinds])
    return Shown(kinds, images, maps, refine(maps, REFINE), torch.tensor([record.id for record in records]))


def prompts_sheet(scans: Scans, localizer) -> tuple[Sheet, list[tuple[str, float]]]:
    """One X-ray under three prompts, and the share of the image that each marks."""
    image = read_scans([scans.shown("chest_xray")], SIZE)
    maps = localizer(image.expand(len(XRAY_PROMPTS), -1, -1, -1), list(XRAY_PROMPTS))
    regions = refine(maps, REFINE)
    shares = [float(region.mean()) for region in regions]
    cells = [Cell(heat_map(heat, image=image[0]), f"region: {100 * share:.1f} % of the image") for heat, share in zip(maps, shares, strict=True)]
    sheet = Sheet(("Image", *(f"“{prompt}”" for prompt in XRAY_PROMPTS))).add("", Cell(picture(image[0]), "the patient's left is on the right"), *cells)
    return sheet, list(zip(XRAY_PROMPTS, shares, strict=True))


def policies() -> tuple[Policy, Policy]:
    """The region policy, and the uniform one with as many visible patches in every image."""
    region = mwm.create_policy("region", high=HIGH, low=LOW)
    return region, mwm.create_policy("uniform", match=region)


def draw(policy: Policy, shown: Shown, *, seed: int = 0) -> Tensor:
    """Masks of the shown scans. bool [3, Gh, Gw]"""
    grid = (shown.images.shape[2] // PATCH, shown.images.shape[3] // PATCH)
    return policy(shown.regions, grid=grid, seed=seed, ids=shown.ids, epoch=0)


def cases_sheet(shown: Shown, active: Tensor, policy: Policy) -> Sheet:
    """Image, heat map, region, mask of one scan of each kind."""
    sheet = Sheet(("Image", "Heat map", "Region", "Mask"))
    for k, label in enumerate(shown.labels()):
        sheet.add(label, picture(shown.images[k]), heat_map(shown.maps[k]), overlay(shown.images[k], shown.regions[k]),
                  Cell(mask_picture(shown.images[k], active[k], region=shown.regions[k]), _hidden(active[k], shown.regions[k], policy)))
    return sheet


def policies_sheet(shown: Shown, region_mask: Tensor, uniform_mask: Tensor, policy: Policy) -> Sheet:
    """Region and uniform mask side by side, with the count that they share."""
    sheet = Sheet(("Image and region", "Region mask", "Uniform mask"))
    for k, label in enumerate(shown.labels()):
        visible, patches = int(region_mask[k].sum()), region_mask[k].numel()
        sheet.add(f"{label} · {visible} of {patches} patches visible in both", overlay(shown.images[k], shown.regions[k]),
                  *(Cell(mask_picture(shown.images[k], mask[k], region=shown.regions[k]), _hidden(mask[k], shown.regions[k], policy))
                    for mask in (region_mask, uniform_mask)))
    return sheet


def shares_chart(inside: Tensor, ids: Tensor, grid: tuple[int, int], named: dict[str, Policy], *, epochs: int = 4, seed: int = 0) -> Chart:
    """Hidden share inside and outside the region, by policy, over all scans and some epochs.

    Args:
        inside: patches that are region. bool [N, Gh, Gw]
        ids: [N]
        named: policies by the name they get in the chart.
    """
    rows = []
    for name, policy in named.items():
        found = [region_statistics(inside, policy, grid=grid, ids=ids, seed=seed, epoch=epoch) for epoch in range(epochs)]
        mean = [sum(getattr(s, part) for s in found) / epochs for part in ("hidden_inside", "hidden_outside", "hidden")]
        rows.append((name, list(zip(("inside", "outside", "overall"), mean, strict=True))))
    return share_bars(rows)


def _hidden(active: Tensor, region: Tensor, policy: Policy) -> str:
    inside = policy.inside(region[None], tuple(active.shape))[0]
    hidden = ~active
    share = [float(hidden[part].float().mean()) if part.any() else float("nan") for part in (inside, ~inside)]
    return f"hidden: {percent(share[0])} inside, {percent(share[1])} outside, {int(active.sum())} visible"
