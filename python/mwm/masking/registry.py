"""Policies by name. A new policy is one file of this room: a class under `@register_policy`; the room imports all its files."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from mwm.masking.policy import Policy

_POLICIES: dict[str, type[Policy]] = {}
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_TAKEN = ("auto", "matched")  # words of `mwm pretrain --mask` that are no policies
_PLAIN = (bool, int, float, str, type(None))
PolicyClass = TypeVar("PolicyClass", bound=type[Policy])


def register_policy(policy: PolicyClass) -> PolicyClass:
    """Class decorator, above ``@dataclass(frozen=True)``: make a policy known by its `name`, to Python, flags and config files.

    Raises:
        TypeError: the class is no frozen dataclass, or lacks a name, a docstring, or a setting's default.
        ValueError: the name is another policy's.
    """
    where = f"register_policy: {policy.__name__}"
    if not (issubclass(policy, Policy) and "__dataclass_params__" in vars(policy) and policy.__dataclass_params__.frozen):
        raise TypeError(f"{where} must be a frozen dataclass on Policy. Write @dataclass(frozen=True) below @register_policy.")
    name = getattr(policy, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise TypeError(f'{where} must have a name of small letters, digits and underscores, got {name!r}. Write name: ClassVar[str] = "…".')
    if not (vars(policy).get("__doc__") or "").strip() or policy.__doc__.startswith(f"{policy.__name__}("):  # what dataclass puts in place of none
        raise TypeError(f"{where} must have a docstring, whose first line `mwm pretrain --help` shows, got none.")
    bare = [field.name for field in dataclasses.fields(policy) if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING]
    if bare:
        raise TypeError(f"{where} must have a default for every setting, got none for {', '.join(bare)}.")
    before = _POLICIES.get(name)
    if name in _TAKEN or (before is not None and (before.__module__, before.__qualname__) != (policy.__module__, policy.__qualname__)):
        raise ValueError(f"{where} must have a name of its own, got {name!r}, which is taken.")
    _POLICIES[name] = policy
    return policy


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


def describe_policy(name: str) -> str:
    """A policy in one line: the first line of its docstring, and its settings with their defaults."""
    words = inspect.cleandoc(_POLICIES[name].__doc__ or "").splitlines()[0].rstrip(".")
    settings = ", ".join(f"{one}={_default(name, parameter)}" for one, parameter in inspect.signature(_POLICIES[name]).parameters.items())
    return f"{words}; settings: {settings or 'none'}"


def _default(name: str, parameter: inspect.Parameter) -> str:
    factory = next((field.default_factory for field in dataclasses.fields(_POLICIES[name]) if field.name == parameter.name), dataclasses.MISSING)
    value = parameter.default if factory is dataclasses.MISSING else factory()
    return value.name if isinstance(value, Policy) else repr(value)


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


def policy_of_run(name: str, shared: Mapping[str, Any], own: Mapping[str, Any]) -> Policy:
    """Build a policy from what a run says of it.

    Args:
        name: One of `list_policies()`.
        shared: What flags of their own set for every policy (mask_ratio, high, low, min_cover, empty), as far as it was given. A ratio sets the field
            `mask_ratio`, or `overall` where the policy has no such field.
        own: Further settings by name; they must have the types of the policy's fields.

    Raises:
        ValueError: the name is unknown, a setting was given twice, or is out of its range.
        TypeError: a setting is unknown or of the wrong type.
    """
    known, settings = settings_of(name), dict(shared)
    if "mask_ratio" in settings and "mask_ratio" not in known and "overall" in known:
        settings["overall"] = settings.pop("mask_ratio")
    twice = sorted(set(settings) & set(own))
    if twice:
        raise ValueError(f"{name}: {twice[0]} must be given once, got its own flag and a mask setting. Leave one of them out.")
    hints = typing.get_type_hints(_POLICIES[name])
    for setting, value in own.items():
        if setting in known and setting in hints:
            _check_kind(name, setting, value, hints[setting])
    return create_policy(name, **settings, **own)


def _check_kind(name: str, setting: str, value: Any, hint: Any) -> None:
    """Refuse a value that is not of the type that a field states, so that no policy need look at more than its ranges."""
    kinds = typing.get_args(hint) or (hint,)
    if not all(kind in _PLAIN for kind in kinds):
        raise TypeError(f"{name}: {setting} must be left out of a run's mask settings, which are numbers and texts.")
    if type(value) not in kinds and not (type(value) is int and float in kinds):
        words = " or ".join({int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}[kind] for kind in kinds)
        raise TypeError(f"{name}: {setting} must be {words}, got {value!r}.")


def policy_from_dict(settings: dict[str, Any]) -> Policy:
    """Read back what `Policy.to_dict` wrote. The dict holds the name beside the settings; nested policies likewise."""
    settings = dict(settings)
    if "name" not in settings:
        raise ValueError(f"policy_from_dict: settings must hold the policy's name, got keys {', '.join(settings) or 'none'}.")
    name = settings.pop("name")
    return create_policy(name, **{key: policy_from_dict(value) if isinstance(value, dict) else value for key, value in settings.items()})
