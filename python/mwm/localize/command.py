"""What `mwm localize` does: plain values in, files and a printed summary out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mwm.data import blob, read_list
from mwm.localize.check import CheckReport, check_localizer, may_ignore_text
from mwm.localize.ensemble import EnsembleLocalizer
from mwm.localize.folder import LocalizeReport, localize_folder
from mwm.localize.prompt_sets import PromptSet, resolve_prompts
from mwm.localize.protocol import Localizer
from mwm.localize.refine import RefineSettings
from mwm.localize.region_report import FILE
from mwm.localize.registry import create_localizer, describe_localizers


def run_localize(
    images: str | Path | None = None,
    prompt: str | None = None,
    out: str | Path = "regions",
    *,
    localizer: str = "tiny",
    checkpoint: str | Path | None = None,
    revision: str | None = None,
    device: Any = None,
    prompt_set: str | None = None,
    negatives: Sequence[str] = (),
    settings: Mapping[str, Any] | Sequence[str] | None = None,
    force: bool = False,
    split: str | None = None,
    root: str | Path | None = None,
    read: Any = None,
    batch_size: int = 8,
    workers: int = 2,
    sam: str | Path | None = None,
    sam_revision: str | None = None,
    sam_boxes: str = "component",
    strict: bool = False,
    progress: bool = True,
    list: bool = False,
    vocabulary: bool = False,
    **refinement: Any,
) -> LocalizeReport | None:
    """Localize a folder and print what was done.

    Args:
        images: Folder, glob, text list or index CSV.
        prompt: Text for every image; the `prompt` column of an index CSV goes before it.
        out: Folder of the regions.
        localizer: Name; `list` prints them.
        checkpoint: Hub name or folder of a model, or for "maps" the folder of masks.
        revision: Commit, branch or tag of the checkpoint's hub name; a preset's own where left out, else the newest.
        device: Where the model runs.
        prompt_set: NAME[:LEVEL] of a prompt set, instead of a prompt: the mean of the maps of its sentences; the set's number of parts
            (two lungs) counts where `components` is left out.
        negatives: Texts whose maps are subtracted.
        settings: Further settings of the localizer, by name, or as texts NAME=VALUE.
        force: Go on where the check of 16 images says that the maps do not follow the text.
        split: Only images of this split of an index CSV.
        root: Folder that the CSV's paths start from.
        read: `mwm.data.ReadSettings`; the defaults where left out.
        batch_size: Images of one size that are localized together.
        workers: Threads that read images ahead.
        sam: Checkpoint of a SAM that redraws the parts of each region: a preset, a hub name, or a folder.
        sam_revision: Commit, branch or tag of the SAM's hub name.
        sam_boxes: "component" (a box per part) or "joint" (one box around all).
        strict: Stop at the first file that cannot be read.
        progress: Show a progress bar.
        list: Print the localizers and stop.
        vocabulary: Print the words that "tiny" knows and stop.
        **refinement: Fields of `RefineSettings`; None stands for a field's default.

    Returns:
        The report, or None where something was only printed.

    Raises:
        ValueError: an argument does not fit, the maps do not follow the text, or the prompt matches nothing; one sentence each.
        TypeError: an argument is unknown.
    """
    if list:
        print(describe_localizers())
        return None
    if vocabulary:
        from mwm.localize.tiny import TinyLocalizer

        print("\n".join(TinyLocalizer.vocabulary()))
        return None
    if images is None:
        raise ValueError("localize: images must be a folder, glob, text list or index CSV, got none. For example: mwm localize SCANS --prompt 'both lungs'.")
    given = {name: value for name, value in refinement.items() if value is not None}
    found, chosen = open_localizer({"localizer": localizer, "checkpoint": checkpoint, "revision": revision, "device": device, "prompt": prompt,
                                    "prompt_set": prompt_set, "negatives": negatives, "settings": settings}, read)
    if chosen is not None and chosen.components is not None:
        given.setdefault("components", chosen.components)
    told = first_check(found, images, prompt, out, read=read, split=split, root=root, absent=chosen.absent if chosen else None, force=force, progress=progress)
    report = localize_folder(
        images, prompt_set or prompt, found, out, RefineSettings(**given) if given else None,
        read=read, split=split, root=root, batch_size=batch_size, workers=workers, sam=_sam(sam, sam_revision, sam_boxes, device), strict=strict, progress=progress,
    )
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(filter(None, (str(report), str(report.regions)))))
        if told is not None:
            _note(Path(out).expanduser() / FILE, told)
    return report


def _sam(checkpoint: str | Path | None, revision: str | None, boxes: str, device: Any) -> Any:
    if checkpoint is None:
        if revision is not None:
            raise ValueError(f"localize: --sam-revision must go with --sam, got {revision!r} alone. Name the SAM, or leave it out.")
        return None
    from mwm.localize.sam import SamRefiner

    return SamRefiner(checkpoint, device=device, revision=revision, boxes=boxes)


def open_localizer(given: Mapping[str, Any], read: Any = None) -> tuple[Localizer, PromptSet | None]:
    """The localizer that flags describe, with its prompts.

    Args:
        given: Of which `localizer`, `checkpoint`, `revision`, `device`, `settings`, `prompt`, `prompt_set` and `negatives` are used.
        read: `mwm.data.ReadSettings`, for masks of volumes, which are sliced like the images.

    Returns:
        The localizer, wrapped where a prompt set or negative prompts are given, and the prompt set, if any.

    Raises:
        ValueError: they do not fit together.
        TypeError: a setting is unknown.
    """
    name = given.get("localizer") or "tiny"
    own = localizer_settings(given.get("settings")) | ({"read": read} if name == "maps" else {})
    if given.get("revision") is not None:
        if given.get("checkpoint") is None:
            raise ValueError(f"localize: --revision must go with --checkpoint, got {given['revision']!r} alone. Name the checkpoint, or leave it out.")
        own["revision"] = given["revision"]
    chosen, sentences = resolve_prompts(given["prompt_set"]) if given.get("prompt_set") else (None, [])
    if chosen is not None and given.get("prompt"):
        raise ValueError("localize: one of prompt and prompt_set must be given, got both. Leave one out.")
    found = create_localizer(name, checkpoint=given.get("checkpoint"), device=given.get("device"), **own)
    negatives = given.get("negatives") or ()
    if sentences or negatives:
        found = EnsembleLocalizer(found, sentences, [negatives] if isinstance(negatives, str) else negatives)
    return found, chosen


def localizer_settings(given: Mapping[str, Any] | Sequence[str] | None) -> dict[str, Any]:
    """Settings by name; texts NAME=VALUE are read as YAML values.

    Raises:
        ValueError: a text is no NAME=VALUE.
    """
    if not given or isinstance(given, Mapping):
        return dict(given or {})
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ValueError(f"localize: --setting must be NAME=VALUE, got {text!r}. For example --setting layer=7.")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"localize: --setting must be NAME=VALUE with a plain value, got {text!r}.") from error
    return found


def first_check(localizer: Localizer, images: str | Path, prompt: str | None, out: str | Path, *, read: Any = None, split: str | None = None,
                root: str | Path | None = None, absent: str | None = None, force: bool = False, progress: bool = True) -> dict[str, Any] | None:
    """Look at 16 images before all, where a localizer answers any text; a check of the same images and texts that `out` already holds is not repeated.

    Returns:
        The check as plain values, or None where none is needed.

    Raises:
        ValueError: the maps do not follow the text, and `force` is off.
    """
    if not may_ignore_text(localizer):
        return None
    records = list(read_list(images, split=split, root=root, settings=read))
    listed = blob.key(*(f"{record.hashed} {record.prompt or ''}" for record in records))
    asked = f"{localizer.fingerprint} {prompt} {absent} {listed}"
    told = _earlier_check(Path(out).expanduser() / FILE, asked)
    if told is None:
        report: CheckReport = check_localizer(localizer, records, prompt, read=read, absent=absent, progress=progress)
        if os.environ.get("RANK", "0") == "0":  # under torchrun every process looks at the same images and comes to the same verdict
            print(report)
        told = report.to_dict() | {"asked": asked}
    if told["verdict"] == "fail" and not force:
        raise ValueError(f"localize: the maps do not follow the text: {'; '.join(told['reasons'])}. Look at them with `mwm localize check`, reword the prompt or take another "
                         "localizer; --force of mwm localize goes on all the same.")
    return told


def _note(path: Path, told: dict[str, Any]) -> None:
    """Keep the check in the report of the regions."""
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        kept = {}
    blob.write_bytes(path, (json.dumps((kept if isinstance(kept, dict) else {}) | {"check": told}, indent=1) + "\n").encode())


def _earlier_check(path: Path, asked: str) -> dict[str, Any] | None:
    try:
        told = json.loads(path.read_text())["check"]
        return told if told["asked"] == asked and told["verdict"] in ("pass", "weak", "fail") and isinstance(told["reasons"], list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
