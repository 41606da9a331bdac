"""Pictures and pages: overlays, galleries, curves and a self-contained report. numpy and Pillow only."""

from __future__ import annotations

from mwm.view.chart import Chart
from mwm.view.confusion import confusion_matrix
from mwm.view.curves import interval_chart, loss_curve, share_bars
from mwm.view.overlay import heat_map, mask_picture, overlay, picture
from mwm.view.pixels import save
from mwm.view.report import Report
from mwm.view.sheet import Cell, Sheet, gallery, percent, reconstruction_panel, reconstruction_sheet

__all__ = [
    "Cell",
    "Chart",
    "Report",
    "Sheet",
    "confusion_matrix",
    "gallery",
    "heat_map",
    "interval_chart",
    "loss_curve",
    "mask_picture",
    "overlay",
    "percent",
    "picture",
    "reconstruction_panel",
    "reconstruction_sheet",
    "save",
    "share_bars",
]
