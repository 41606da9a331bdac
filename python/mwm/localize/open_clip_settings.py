"""The settings of an open_clip checkpoint, read before open_clip reads them: they may name other models to fetch, and code to run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mwm.localize.checkpoints import first_line
from mwm.localize.tower import OPEN_CLIP_CONFIG

_TOKENIZER = ("clean", "strip_sep_token", "language", "reduction_mask", "additional_special_tokens")  # open_clip hands all others on to AutoTokenizer, trust_remote_code included
_TIMM_NAME = re.compile(r"\w+(\.\w+)?")  # without a place such as hf-hub: in front
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_MOST = 1 << 20


@dataclass(frozen=True)
class OpenClipSettings:
    """What of the settings is handed on.

    Attributes:
        text: `text_cfg`, whose text model of transformers, if any, is named by a folder with its configuration.
    """

    text: dict[str, Any]


def read_settings(folder: Path, name: str, source: str, local_only: bool) -> OpenClipSettings:
    """Read and check `open_clip_config.json`.

    BiomedCLIP's kind names its text model by a hub name, of which nothing but config.json is needed. It is taken from the folder, or from the local cache; only where the
    checkpoint itself is a hub name it is fetched.

    Args:
        folder: The checkpoint.
        name: The localizer, for messages.
        source: What the user typed, for messages.
        local_only: Fetch nothing.

    Raises:
        ValueError: the settings are none, ask for code to be run, name a model by a place, or the text model's configuration is not there.
    """
    stored = _json(folder / OPEN_CLIP_CONFIG, name, source)
    model = stored.get("model_cfg")
    text, vision = (model.get(part) if isinstance(model, dict) else None for part in ("text_cfg", "vision_cfg"))
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise ValueError(f"{name}: {OPEN_CLIP_CONFIG} must hold model_cfg with text_cfg and vision_cfg, got {source!r} without. Download or save it again.")
    extra = text.get("tokenizer_kwargs") or {}
    asked = sorted(set(extra) - set(_TOKENIZER)) if isinstance(extra, dict) else ["no mapping"]
    if asked:
        raise ValueError(f"{name}: tokenizer_kwargs in {OPEN_CLIP_CONFIG} must be among {', '.join(_TOKENIZER)}, got {str(asked[0])[:60]!r} in {source!r}. "
                         "Code of a checkpoint of open_clip is never run; remove the entry if you trust the rest.")
    trunk = vision.get("timm_model_name")
    if trunk is not None and not (isinstance(trunk, str) and _TIMM_NAME.fullmatch(trunk)):
        raise ValueError(f"{name}: timm_model_name in {OPEN_CLIP_CONFIG} must be the plain name of a model of timm, got {str(trunk)[:80]!r} in {source!r}. "
                         "What a checkpoint points at is not fetched.")
    named = text.get("hf_model_name")
    if named:
        text = {**text, "hf_model_name": str(_text_model(str(named), folder, name, source, local_only)), "hf_model_pretrained": False}
    return OpenClipSettings(text)


def _text_model(named: str, folder: Path, name: str, source: str, local_only: bool) -> Path:
    """The folder that holds the configuration of the text model."""
    own = _json(folder / "config.json", name, source) if (folder / "config.json").is_file() else {}
    if own and "vision_config" not in own:  # else that of a whole CLIP
        place, found = folder, own
    else:
        place = _from_cache(named, name, source, local_only)
        found = _json(place / "config.json", name, source)
    if found.get("auto_map"):
        raise ValueError(f"{name}: the text model of {source!r} must be one of transformers' own, got {named[:80]!r}, which comes with code. It is never run.")
    return place


def _from_cache(named: str, name: str, source: str, local_only: bool) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        if not _HUB_NAME.fullmatch(named):
            raise ValueError("it is no hub name")
        return Path(hf_hub_download(named, "config.json", local_files_only=local_only)).parent
    except Exception as error:
        raise ValueError(f"{name}: checkpoint {source!r} must hold config.json of its text model {named[:80]!r}, which is neither there nor in the local cache "
                         f"({first_line(error)}). Put that file into the folder.") from error


def _json(path: Path, name: str, source: str) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > _MOST:
            raise ValueError(f"no file of at most {_MOST >> 20} MiB")
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {path.name} must be a JSON file, but that of {source!r} cannot be read ({first_line(error)}). Download or save it again.") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{name}: {path.name} must hold a JSON object, got {type(stored).__name__} in {source!r}. Download or save it again.")
    return stored
