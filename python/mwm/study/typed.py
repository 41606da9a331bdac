"""Values of a study's file against the settings that they are for, so that one of a wrong type is refused before the first hour, in one sentence."""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from mwm.study.errors import StudyError

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a mapping of settings", Mapping: "a mapping of settings", type(None): "null"}


def check_types(values: Mapping[str, Any], kind: type, where: str) -> None:
    """Refuse a value of another type than its field has.

    Args:
        values: by name of the field, as YAML gives them; names that `kind` does not have are passed over.
        kind: dataclass of the settings.
        where: of the file, for the message.

    Raises:
        StudyError: a value is of another type, or a number that is not finite.
    """
    for name, value in values.items():
        hint = _hints(kind).get(name)
        if hint is not None and not _fits(value, hint):
            raise StudyError(f"study: {where}.{name} must be {_words(hint)}, got {value!r}.")


@functools.cache
def check_encoder(name: str) -> None:
    """Refuse a network that nobody has; the first cell would find out only after its regions were made.

    Args:
        name: a timm name, or "torchvision/NAME".

    Raises:
        StudyError: there is no such network.
    """
    near: list[str] = []
    if name.startswith("torchvision/"):
        from torchvision import models

        known = name.removeprefix("torchvision/") in models.list_models(module=models)
    else:
        import timm

        known = timm.is_model(name)
        near = timm.list_models(f"*{name.split('.')[0]}*")[:3] if name and not known else []
    if not known:
        raise StudyError(f"study: pretrain.encoder must be a model of timm, or torchvision/NAME, got {name!r}.{' Near are ' + ', '.join(near) + '.' if near else ''}")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    plain = typing.get_origin(hint) or hint
    if plain is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(typing.get_args(hint)) and all(map(_fits, value, typing.get_args(hint)))
    if plain in (int, float):
        return isinstance(value, (int, plain)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, plain)


def _words(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_words, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list of {len(typing.get_args(hint))} {'texts' if str in typing.get_args(hint) else 'numbers'}"
    return _WORDS[typing.get_origin(hint) or hint]
