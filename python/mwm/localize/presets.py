"""Checkpoints that are known by a short name: where they come from, at which commit, and the settings they are used with.

Commits are quoted from public documents, each from several projects that pin the same one, not looked up at run time. Another one is taken with `revision` (--revision). A preset
is `tested` once it was run where this package is made; the others were not: their code paths are tested with small random models of the same classes, and the first real run is
the user's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Preset:
    """A checkpoint.

    Attributes:
        name: Short name.
        localizer: The localizer (or refinement) that takes it.
        hub: Hub name; "hf-hub:" in front of models of open_clip.
        revision: Commit.
        licence: Of the weights, as their publisher states it.
        megabytes: Download.
        images: Input size and normalisation, for people; the numbers are read from the checkpoint.
        layer: Block of the bottleneck, or None.
        beta: Price of information, or None.
        tested: Whether it was run here.
        bare_tensors: Whether its commit holds no safetensors, so that its .bin file is read, as tensors and nothing else (`torch.load(weights_only=True)`).
        note: What else to know.
    """

    name: str
    localizer: str
    hub: str
    revision: str
    licence: str
    megabytes: int
    images: str
    layer: int | None = None
    beta: float | None = None
    tested: bool = False
    bare_tensors: bool = False
    note: str = ""


_ALL = (
    Preset("biomedclip", "bottleneck", "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", "9f341de24bfb00180f1b847274256e9b65a3a32e", "MIT", 784,
           "224, CLIP mean and std", 7, 0.1, bare_tensors=True, note="PMC-15M; needs open_clip"),
    Preset("clip-vit-b16", "bottleneck", "openai/clip-vit-base-patch16", "5ef227a78de3f75873f373246dac80def63b0003", "MIT", 599, "224, CLIP mean and std", 9, 0.1,
           note="natural images; the hub's own conversion to safetensors (refs/pr/17), which the main branch lacks"),
    Preset("siglip-base", "bottleneck", "google/siglip-base-patch16-224", "7fd15f0689c79d79e38b1c2e2e2370a7bf2761ed", "Apache-2.0", 813, "224, mean and std 0.5", 7, 0.1,
           note="natural images"),
    Preset("clipseg-rd64", "clipseg", "CIDAS/clipseg-rd64-refined", "999e0328d9e10b484360c477313983f9afdd7050", "Apache-2.0", 603, "352, ImageNet mean and std",
           note="natural images; safetensors where its commit has them, else a .bin file, read as bare tensors"),
    Preset("groundingdino-tiny", "detector", "IDEA-Research/grounding-dino-tiny", "a2bb814dd30d776dcf7e30523b00659f4f141c71", "Apache-2.0", 689,
           "shorter edge 800, ImageNet mean and std", note="natural images"),
    Preset("owlv2-base", "detector", "google/owlv2-base-patch16-ensemble", "cfd3195ba4ea9592eec887ded089f4c08eff231d", "Apache-2.0", 620, "960 padded, CLIP mean and std",
           note="natural images"),
    Preset("sam-vit-b", "sam", "facebook/sam-vit-base", "70c1a07f894ebb5b307fd9eaaee97b9dfc16068f", "Apache-2.0", 375, "1024 padded, ImageNet mean and std", note="natural images"),
    Preset("medsam", "sam", "wanglab/medsam-vit-base", "de8488bca37bb1d4fb190f612c516126d739ce3b", "Apache-2.0", 375, "1024 padded, ImageNet mean and std", bare_tensors=True,
           note="medical images"),
)
PRESETS: dict[str, Preset] = {known.name: known for known in _ALL}
_REVISION = re.compile(r"\w[\w.-]*(/[\w-][\w.-]*)*")


def preset(checkpoint: str | Path, localizer: str) -> Preset | None:
    """The preset that a checkpoint names, by its short name or its hub name; None for folders and other names.

    Args:
        checkpoint: What the user typed.
        localizer: Who asks.

    Raises:
        ValueError: the short name belongs to another localizer.
    """
    text = str(checkpoint)
    if Path(text).expanduser().is_dir():
        return None
    known = PRESETS.get(text) or next((found for found in _ALL if found.hub.removeprefix("hf-hub:") == text.removeprefix("hf-hub:")), None)
    gradient_maps = ("gradcam", "gscorecam")
    if known is None or known.localizer == localizer or (known.localizer == "bottleneck" and localizer in gradient_maps):
        return known
    raise ValueError(f"{localizer}: checkpoint must be one of its own, got {text!r}, which is for {known.localizer}. `mwm localize --list` shows the presets.")


def pinned(checkpoint: str | Path, localizer: str, revision: str | None = None) -> tuple[str, str | None, Preset | None]:
    """What to read, at which commit, and the preset that was named, if any.

    Args:
        checkpoint: What the user typed: preset, hub name or folder.
        localizer: Who asks.
        revision: Commit, branch or tag that the user asked for; it goes before the preset's.

    Raises:
        ValueError: the short name belongs to another localizer, the revision is no such name, or it is given with a folder, which has none.
    """
    known = preset(checkpoint, localizer)
    if revision is not None:
        if not isinstance(revision, str) or not _REVISION.fullmatch(revision) or ".." in revision:
            raise ValueError(f"{localizer}: revision must be a commit, branch or tag of the hub, got {revision!r}. For example main, or the 40 letters of a commit.")
        if Path(str(checkpoint)).expanduser().is_dir():
            raise ValueError(f"{localizer}: revision must be left out for a local folder, got {revision!r} with {str(checkpoint)!r}. It belongs to hub names.")
    return known.hub if known else str(checkpoint), revision or (known.revision if known else None), known


def describe_presets() -> str:
    """One line per preset, as `mwm localize --list` prints them."""
    lines = []
    for known in _ALL:
        settings = "" if known.layer is None else f"; layer {known.layer}, beta {known.beta:g}"
        tested = ("; a .bin file, read as bare tensors" if known.bare_tensors else "") + ("" if known.tested else "; untested here")
        lines.append(f"  {known.name:18} {known.localizer:10} {known.hub.removeprefix('hf-hub:')} ({known.revision[:8]}), {known.megabytes} MB, {known.licence}; "
                     f"{known.images}{settings}; {known.note}{tested}")
    return "\n".join(lines)
