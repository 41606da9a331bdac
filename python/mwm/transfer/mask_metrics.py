"""The figures of masks under their earlier name; they live with the data, so that localizing may use them too: see `mwm.data.mask_metrics`."""

from __future__ import annotations

from mwm.data.mask_metrics import (
    FIGURES,
    dice,
    hd95,
    image_figures,
    iou,
    mask_summary,
    mean_with_interval,
    nsd,
    pair_figures,
    pointing_hit,
    surface,
    surface_distances,
)

__all__ = ["FIGURES", "dice", "hd95", "image_figures", "iou", "mask_summary", "mean_with_interval", "nsd", "pair_figures", "pointing_hit", "surface", "surface_distances"]
