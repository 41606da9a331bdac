"""What a checkpoint learnt from in `mwm localize train`: kept in its config.json, so that it follows the weights, and told wherever its regions go.

A localizer that learnt from masks finds regions by annotations, whatever text it is asked with. Such regions are a *supervised region source*.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY = "mwm_training"
SUPERVISED = "supervised region source"
_WORDS = {"masks": "masks", "captions": "captions"}
_DEEP = 16  # trainings of one model after another


@dataclass(frozen=True)
class Training:
    """What a localizer learnt from.

    Attributes:
        on: "masks" or "captions".
        images: Number of images with one, those that chose the epoch included; None where it is not known.
        list: Hash of the images with their masks or captions, or where to read about them.
        before: What the model had learnt from in an earlier `mwm localize train`, if in any.
    """

    on: str
    images: int | None
    list: str
    before: Training | None = None

    @property
    def supervised(self) -> bool:
        """Whether masks are behind the weights, now or earlier."""
        return self.on == "masks" or (self.before is not None and self.before.supervised)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for config.json."""
        return {"on": self.on, "images": self.images, "list": self.list} | ({"before": self.before.to_dict()} if self.before else {})

    def source(self) -> dict[str, Any]:
        """Plain values, for `meta.source` of a folder of regions."""
        return {"kind": SUPERVISED if self.supervised else "localizer trained on captions", "trained_on": self.on, "images": self.images, "list": self.list}


def training_from(value: Any, name: str = "localize") -> Training | None:
    """What `Training.to_dict` wrote; None where there is nothing.

    Args:
        value: From a configuration.
        name: The localizer, for messages.

    Raises:
        ValueError: it is something else; a checkpoint that may have seen masks is not taken for one that has not.
    """
    return None if value is None else _parse(value, name, 0)


def training_of(checkpoint: str | Path) -> Training | None:
    """What the checkpoint in a local folder learnt from, without loading it; None for hub names, presets, and folders that `mwm localize train` did not write.

    Raises:
        ValueError: its config.json is damaged.
    """
    path = Path(checkpoint).expanduser() / "config.json"
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"localize: config.json in {path.parent.name} must be JSON, but cannot be read. Download or save the checkpoint again.") from error
    return training_from(stored.get(KEY) if isinstance(stored, dict) else None)


def source_line(source: Any) -> str:
    """One line about `meta.source` of a folder of regions, "" where there is none.

    Args:
        source: Whatever a folder holds there; other tools write other facts.
    """
    kind = source.get("kind") if isinstance(source, Mapping) else None
    if not isinstance(kind, str) or not kind.isprintable() or len(kind) > 120:
        return ""
    images, on = source.get("images"), _WORDS.get(str(source.get("trained_on")))
    behind = f"; the localizer learnt from {on}" + (f" of {images} images" if isinstance(images, int) else "") if on else ""
    return f"source: {kind}{behind}" + ("; these regions are not found by text alone" if kind == SUPERVISED else "")


def _parse(value: Any, name: str, depth: int) -> Training:
    fits = isinstance(value, Mapping) and depth < _DEEP and value.get("on") in _WORDS and isinstance(value.get("images"), int | None) and isinstance(value.get("list"), str)
    if not fits:
        raise ValueError(f"{name}: {KEY} in config.json must be what mwm localize train wrote, got something else. Restore the file.")
    before = value.get("before")
    return Training(value["on"], value["images"], value["list"], None if before is None else _parse(before, name, depth + 1))
