"""Masking policies: regions in, ``active`` out. No model, no pixels.

A policy is a frozen dataclass and a pure function ``policy(region, grid=, seed=, ids=, epoch=, view=0)`` that returns
a bool tensor [B, Gh, Gw], True = visible. The same arguments give the same mask on every machine, in any batch, in any
worker process. Every file of this room is imported here, so that a policy is there once its file is.
"""

from __future__ import annotations

import importlib
import pkgutil

from mwm.masking.coverage import RegionSurvey, inside_grid, split_maps, stack_inside, survey_regions
from mwm.masking.foreground import ForegroundPolicy
from mwm.masking.policy import MaskRequest, Policy
from mwm.masking.region import PRESETS, RegionPolicy
from mwm.masking.registry import create_policy, describe_policy, list_policies, policy_from_dict, policy_of_run, register_policy, settings_of
from mwm.masking.statistics import RegionStatistics, format_statistics, region_statistics
from mwm.masking.uniform import UniformPolicy

__all__ = [
    "PRESETS",
    "ForegroundPolicy",
    "MaskRequest",
    "Policy",
    "RegionPolicy",
    "RegionStatistics",
    "RegionSurvey",
    "UniformPolicy",
    "create_policy",
    "describe_policy",
    "format_statistics",
    "inside_grid",
    "list_policies",
    "policy_from_dict",
    "policy_of_run",
    "region_statistics",
    "register_policy",
    "settings_of",
    "split_maps",
    "stack_inside",
    "survey_regions",
]


def _import_all() -> None:
    """Import every file of the room: importing the file of a policy registers it."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


_import_all()
