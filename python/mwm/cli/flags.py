"""Flags from a config dataclass: one per field, so that command line, YAML and Python name a setting alike."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Collection, Sequence
from typing import Any


def add_fields(parser: argparse.ArgumentParser, config: type, *, skip: Collection[str] = (), positional: Collection[str] = ()) -> None:
    """Add one flag per field of a dataclass.

    A flag that is not typed leaves no trace in the result, so that what remains are the user's own words: they override
    a file, and a resumed run keeps its other settings.

    Args:
        config: a dataclass whose fields carry `metadata["help"]`, a text or what returns one.
        skip: fields without a flag.
        positional: fields that are given by place.
    """
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name in skip:
            continue
        words = field.metadata.get("help", "")
        words = (words() if callable(words) else words).replace("%", "%%")
        if field.name in positional:
            parser.add_argument(field.name, metavar=field.name.upper(), nargs="?", default=argparse.SUPPRESS, help=words)
            continue
        options = _options(hints[field.name])
        if options is None:
            continue
        default = field.default
        if default is not dataclasses.MISSING and default is not None and default != "" and not isinstance(default, bool):
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            words += f" (default: {shown})"
        elif default is True:
            words += " (default: yes)"
        parser.add_argument(f"--{field.name.replace('_', '-')}", dest=field.name, default=argparse.SUPPRESS, help=words, **options)


def named_values(texts: Sequence[str], flag: str, example: str) -> dict[str, Any]:
    """Texts NAME=VALUE as plain values by name, read as in YAML.

    Raises:
        ValueError: a text is no NAME=VALUE, or its value is no number, text, true, false or null.
    """
    import yaml

    from mwm.train.config import as_number

    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ValueError(f"{flag} must be NAME=VALUE, got {text!r}. For example {flag} {example}.")
        if name.strip() in found:
            raise ValueError(f"{flag} must name a setting once, got {name.strip()} twice. Leave one of them out.")
        try:
            plain = as_number(yaml.safe_load(value))
        except (yaml.YAMLError, ValueError, RecursionError):
            plain = ...
        if not isinstance(plain, (bool, int, float, str, type(None))):
            raise ValueError(f"{flag} must be NAME=VALUE with a number or a text, got {text[:80]!r}.")
        found[name.strip()] = plain
    return found


def _options(hint: Any) -> dict[str, Any] | None:
    """How argparse reads a value of this type; None where it cannot."""
    kinds = [k for k in (typing.get_args(hint) if _is_union(hint) else (hint,)) if k is not type(None)]
    pair = next((k for k in kinds if typing.get_origin(k) is tuple), None)
    plain = [k for k in kinds if k in (bool, int, float, str)]
    if pair is not None:
        element = typing.get_args(pair)[0]
        if Ellipsis in typing.get_args(pair):
            return {"type": element, "nargs": "+", "action": AsTuple, "metavar": {int: "N", float: "X", str: "TEXT"}[element]}
        if plain:
            return {"type": element, "nargs": "+", "action": OneOrTwo, "metavar": "N"}
        return {"type": element, "nargs": len(typing.get_args(pair)), "action": AsTuple, "metavar": "N"}
    if not plain:
        return None
    kind = plain[0]
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}


def _is_union(hint: Any) -> bool:
    import types

    return typing.get_origin(hint) in (typing.Union, types.UnionType)


class OneOrTwo(argparse.Action):
    """One number as it is, two as a tuple."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        if len(values) > 2:
            parser.error(f"argument {option_string}: expected one number or two (height width), got {len(values)}")
        setattr(namespace, self.dest, values[0] if len(values) == 1 else tuple(values))


class AsTuple(argparse.Action):
    """Several numbers as a tuple."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))
