"""Masking policies: regions in, ``active`` out. No model, no pixels.

A policy is a frozen dataclass and a pure function ``policy(region, grid=, seed=, ids=, epoch=, view=0)`` that returns
a bool tensor [B, Gh, Gw], True = visible. The same arguments give the same mask on every machine, in any batch, in any
worker process.
"""

from __future__ import annotations

from mwm.masking.coverage import RegionSurvey, inside_grid, split_maps, stack_inside, survey_regions
from mwm.masking.foreground import ForegroundPolicy
from mwm.masking.policy import MaskRequest, Policy
from mwm.masking.region import PRESETS, RegionPolicy
from mwm.masking.registry import create_policy, list_policies, policy_from_dict, settings_of
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
    "format_statistics",
    "inside_grid",
    "list_policies",
    "policy_from_dict",
    "region_statistics",
    "settings_of",
    "split_maps",
    "stack_inside",
    "survey_regions",
]
