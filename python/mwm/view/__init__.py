"""Pictures and pages: overlays, galleries, curves and a self-contained report. numpy and Pillow only."""

from __future__ import annotations

from mwm.view.calibration import calibration_chart
from mwm.view.chart import Chart
from mwm.view.confusion import confusion_matrix
from mwm.view.curves import interval_chart, loss_curve, share_bars
from mwm.view.overlay import heat_map, mask_picture, overlay, picture
from mwm.view.pixels import save
from mwm.view.report import Report
from mwm.view.roc import roc_chart
from mwm.view.sheet import Cell, Sheet, gallery, percent, reconstruction_panel, reconstruction_sheet

__all__ = [
    "Cell",
    "Chart",
    "Report",
    "Sheet",
    "calibration_chart",
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
    "roc_chart",
    "save",
    "share_bars",
]
