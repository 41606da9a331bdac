"""Flags from a config dataclass: one per field, so that command line, YAML and Python name a setting alike."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Collection
from typing import Any


def add_fields(parser: argparse.ArgumentParser, config: type, *, skip: Collection[str] = (), positional: Collection[str] = ()) -> None:
    """Add one flag per field of a dataclass.

    A flag that is not typed leaves no trace in the result, so that what remains are the user's own words: they override
    a file, and a resumed run keeps its other settings.

    Args:
        config: a dataclass whose fields carry `metadata["help"]`.
        skip: fields without a flag.
        positional: fields that are given by place.
    """
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.name in skip:
            continue
        words = field.metadata.get("help", "").replace("%", "%%")
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
