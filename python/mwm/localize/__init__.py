"""From text to regions: localizers, the refinement of their maps, and a driver for whole folders.

A localizer is a callable ``(images [B, C, H, W] in [0, 1], prompts) → heat maps [B, H, W] in [0, 1]``. The heavy packages are
imported when a localizer is created.
"""

from __future__ import annotations

from mwm.localize.check import CheckReport, check_localizer
from mwm.localize.choose import candidates_of, choose_settings
from mwm.localize.command import run_localize
from mwm.localize.ensemble import EnsembleLocalizer
from mwm.localize.evaluate import evaluate_regions
from mwm.localize.folder import LocalizeReport, localize_folder
from mwm.localize.prompt_sets import PromptSet, list_prompt_sets, load_prompt_set, resolve_prompts
from mwm.localize.protocol import Localizer, UnsupportedImage, check_images
from mwm.localize.refine import RefineSettings, component_boxes, refine
from mwm.localize.region_report import RegionReport
from mwm.localize.registry import create_localizer, list_localizers

__all__ = [
    "CheckReport",
    "EnsembleLocalizer",
    "LocalizeReport",
    "Localizer",
    "PromptSet",
    "RefineSettings",
    "RegionReport",
    "UnsupportedImage",
    "candidates_of",
    "check_images",
    "check_localizer",
    "choose_settings",
    "component_boxes",
    "create_localizer",
    "evaluate_regions",
    "list_localizers",
    "list_prompt_sets",
    "load_prompt_set",
    "localize_folder",
    "refine",
    "resolve_prompts",
    "run_localize",
]
