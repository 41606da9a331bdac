"""Prompt sets: several sentences for one target, as YAML files that come with the package or that a user writes.

Levels of detail, as in MedCLIP-SAMv2: P1 names the target in a few words, P2 describes its class in a sentence, P3 describes its sub-types, one
list per sub-type. Paraphrases are there to be averaged: a map that hangs on one wording is no map of the target.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mwm.localize.checkpoints import first_line

FOLDER = Path(__file__).parent / "prompts"
LEVELS = ("P1", "P2", "P3")
MAX_WORDS = 40
"""Words of a sentence: those of 77 tokens, which CLIP's text towers read, with some to spare."""

_MAX_BYTES = 1 << 18
_MAX_SENTENCES = 500
_MAX_DEPTH = 10


@dataclass(frozen=True)
class PromptSet:
    """Sentences for one target.

    Attributes:
        name: Name of the set, or of its file.
        title: The target in words.
        absent: A sentence about something that its images do not show, for the check of localizers.
        words: Words of which a sentence about the target holds at least one.
        levels: Level to its sentences; P3 to sentences by sub-type.
        components: Parts that the target has (two lungs), or None.
    """

    name: str
    title: str
    levels: dict[str, dict[str, tuple[str, ...]]]
    absent: str = ""
    words: tuple[str, ...] = ()
    components: int | None = None

    def sentences(self, level: str | None = None) -> list[str]:
        """Sentences of a level, of one sub-type ("P3/glioma"), or (None) of P1 and P2.

        Raises:
            ValueError: there is no such level or sub-type.
        """
        if level is None:
            return [text for kind in ("P1", "P2") for texts in self.levels.get(kind, {}).values() for text in texts] or self.sentences(next(iter(self.levels)))
        kind, _, sub = level.partition("/")
        offered = [*self.levels, *(f"{k}/{s}" for k, subs in self.levels.items() for s in subs if s)]
        if kind not in self.levels or (sub and sub not in self.levels[kind]):
            raise ValueError(f"prompts: level of {self.name} must be one of {', '.join(offered)}, got {level!r}.")
        return list(self.levels[kind][sub]) if sub else [text for texts in self.levels[kind].values() for text in texts]

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.title}"]
        for level, subs in self.levels.items():
            for sub, texts in subs.items():
                lines.append(f"{level}/{sub}" if sub else level)
                lines += [f"  {text}" for text in texts]
        if self.absent:
            lines += ["absent, for the check", f"  {self.absent}"]
        return "\n".join(lines)


def list_prompt_sets() -> list[str]:
    """Names of the sets that come with the package, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_prompt_set(name: str | Path) -> PromptSet:
    """A set by its name, or from a YAML file.

    Args:
        name: One of `list_prompt_sets()`, or the path of a .yaml file with the same keys.

    Raises:
        ValueError: there is no such set or file, or the file is no prompt set; one sentence.
    """
    text = str(name)
    if text.lower().endswith((".yaml", ".yml")):
        path = Path(text).expanduser()
        if not path.is_file():
            raise ValueError(f"prompts: set must be a file that is there, got {text!r}. Check the path; `mwm prompts` lists the sets that come with mwm.")
        return _parsed(path)
    known = list_prompt_sets()
    if text not in known:
        near = difflib.get_close_matches(re.sub(r"[\s-]+", "_", text.lower()), known, 1, 0.5) or [k for k in known if set(text.lower().split("_")) & set(k.split("_"))][:1]
        raise ValueError(f"prompts: set must be one of {', '.join(known)}, or a .yaml file, got {text!r}." + (f" Did you mean {near[0]}?" if near else ""))
    return _parsed(FOLDER / f"{text}.yaml")


def resolve_prompts(spec: str) -> tuple[PromptSet, list[str]]:
    """What --prompt-set NAME[:LEVEL] names: the set, and its sentences of that level (P1 and P2 where none is named).

    Raises:
        ValueError: see `load_prompt_set` and `PromptSet.sentences`.
    """
    name, colon, level = str(spec).rpartition(":")
    if not colon or not re.fullmatch(r"[A-Za-z]\w*(/\w+)?", level):
        name, level = str(spec), ""
    found = load_prompt_set(name)
    return found, found.sentences(level or None)


class _Unique(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML takes the last without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for name in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if name in seen:
                raise yaml.YAMLError(f"the key {name[:40]!r} stands there twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _check_events(text: str) -> None:
    """Refuse references, a few lines of which make a text of gigabytes, and deep nesting, which takes minutes to unwind."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("it has references, which a prompt set does not need")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {_MAX_DEPTH} deep")


def _parsed(path: Path) -> PromptSet:
    """A checked set from a file."""
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"prompts: {path.name} must be at most {_MAX_BYTES // 1024} KiB, got {path.stat().st_size // 1024} KiB.")
    try:
        text = path.read_text(encoding="utf-8")
        _check_events(text)
        stored = yaml.load(text, Loader=_Unique)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: dates and numbers that are none, and what is no UTF-8
        raise ValueError(f"prompts: {path.name} must be a YAML file, but cannot be read ({first_line(error)}).") from error
    return parse_prompt_set(path.stem, stored, path.name)


def parse_prompt_set(name: str, stored: Any, where: str = "set") -> PromptSet:
    """A checked set from plain values.

    Args:
        name: Name of the set.
        stored: Mapping with title, absent, words, components and at least one of P1, P2, P3.
        where: For the messages.

    Raises:
        ValueError: keys or values are not as they should be.
    """
    if not isinstance(stored, dict) or set(stored) - {"title", "absent", "words", "components", *LEVELS} or not set(stored) & set(LEVELS):
        raise ValueError(f"prompts: {where} must hold title, absent, words, components and at least one of P1, P2, P3, got "
                         f"{', '.join(map(str, stored)) if isinstance(stored, dict) else type(stored).__name__}.")
    levels: dict[str, dict[str, tuple[str, ...]]] = {}
    for level in LEVELS:
        if level not in stored:
            continue
        groups = stored[level] if isinstance(stored[level], dict) else {"": stored[level]}
        levels[level] = {}
        for sub, texts in groups.items():
            if not isinstance(sub, str) or (sub and not re.fullmatch(r"\w+", sub)) or not isinstance(texts, list) or not texts:
                raise ValueError(f"prompts: {level} of {where} must be a list of sentences, or sub-types with lists of sentences, got {sub!r}: {type(texts).__name__}.")
            for text in texts:
                if not isinstance(text, str) or not text.strip() or len(text.split()) > MAX_WORDS or not text.isprintable():
                    raise ValueError(f"prompts: a sentence in {level} of {where} must be a text of 1 to {MAX_WORDS} words, got {str(text)[:60]!r}.")
            levels[level][sub] = tuple(text.strip() for text in texts)
    if sum(len(texts) for groups in levels.values() for texts in groups.values()) > _MAX_SENTENCES:
        raise ValueError(f"prompts: {where} must hold at most {_MAX_SENTENCES} sentences, got more.")
    for key in ("title", "absent"):
        text = stored.get(key)
        if text is not None and not (isinstance(text, str) and text.isprintable() and len(text.split()) <= MAX_WORDS):
            raise ValueError(f"prompts: {key} of {where} must be a text of at most {MAX_WORDS} words, got {str(text)[:60]!r}.")
    words, components = stored.get("words") or [], stored.get("components")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"prompts: words of {where} must be a list of words, got {str(words)[:60]!r}.")
    if components is not None and (isinstance(components, bool) or not isinstance(components, int) or components < 1):
        raise ValueError(f"prompts: components of {where} must be a whole number of at least 1, got {str(components)[:60]!r}.")
    return PromptSet(name, str(stored.get("title") or name), levels, str(stored.get("absent") or ""), tuple(words), components)
