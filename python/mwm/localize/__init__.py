"""From text to regions: localizers, the refinement of their maps, and a driver for whole folders.

A localizer is a callable ``(images [B, C, H, W] in [0, 1], prompts) → heat maps [B, H, W] in [0, 1]``. The heavy packages are
imported when a localizer is created.
"""

from __future__ import annotations

from mwm.localize.command import run_localize
from mwm.localize.folder import LocalizeReport, localize_folder
from mwm.localize.protocol import Localizer, UnsupportedImage, check_images
from mwm.localize.refine import RefineSettings, component_boxes, refine
from mwm.localize.registry import create_localizer, list_localizers

__all__ = [
    "LocalizeReport",
    "Localizer",
    "RefineSettings",
    "UnsupportedImage",
    "check_images",
    "component_boxes",
    "create_localizer",
    "list_localizers",
    "localize_folder",
    "refine",
    "run_localize",
]
