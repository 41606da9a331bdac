"""Policies by name. A new policy is one file and one entry in the tuple below."""

from __future__ import annotations

import inspect
from typing import Any

from mwm.masking.foreground import ForegroundPolicy
from mwm.masking.policy import Policy
from mwm.masking.region import RegionPolicy
from mwm.masking.uniform import UniformPolicy

_POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (
    ForegroundPolicy,
    RegionPolicy,
    UniformPolicy,
)}


def list_policies() -> list[str]:
    """Names that `create_policy` knows, sorted."""
    return sorted(_POLICIES)


def settings_of(name: str) -> list[str]:
    """Names of the settings that a policy takes.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in _POLICIES:
        raise ValueError(f"create_policy: name must be one of {', '.join(list_policies())}, got {name!r}.")
    return [*inspect.signature(_POLICIES[name]).parameters]


def create_policy(name: str, **settings: Any) -> Policy:
    """Build a masking policy by name.

    Args:
        name: One of `list_policies()`.
        **settings: Fields of the policy, for example ``high=0.8, low=0.4`` for "region" or ``mask_ratio=0.6`` for
            "uniform".

    Returns:
        A frozen policy; call it to draw masks.

    Raises:
        ValueError: the name is unknown, or a setting is out of its range.
        TypeError: a setting is unknown or of the wrong type.
    """
    known = settings_of(name)
    unknown = [setting for setting in settings if setting not in known]
    if unknown:
        raise TypeError(f"create_policy: settings of {name} must be among {', '.join(sorted(known))}, got {', '.join(unknown)}.")
    return _POLICIES[name](**settings)


def policy_from_dict(settings: dict[str, Any]) -> Policy:
    """Read back what `Policy.to_dict` wrote. The dict holds the name beside the settings; nested policies likewise."""
    settings = dict(settings)
    if "name" not in settings:
        raise ValueError(f"policy_from_dict: settings must hold the policy's name, got keys {', '.join(settings) or 'none'}.")
    name = settings.pop("name")
    return create_policy(name, **{key: policy_from_dict(value) if isinstance(value, dict) else value for key, value in settings.items()})
