"""Localizers by name; each is imported when it is asked for. A new one is one file and an entry in the two tables below."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from mwm.localize.presets import PRESETS, describe_presets
from mwm.localize.protocol import Localizer

_LOCALIZERS = {
    "bottleneck": "mwm.localize.bottleneck:BottleneckLocalizer",
    "clipseg": "mwm.localize.clipseg:ClipsegLocalizer",
    "detector": "mwm.localize.detector:DetectorLocalizer",
    "edges": "mwm.localize.edges:EdgesLocalizer",
    "gradcam": "mwm.localize.gradient_maps:GradcamLocalizer",
    "gscorecam": "mwm.localize.gradient_maps:GscorecamLocalizer",
    "maps": "mwm.localize.maps:MapsLocalizer",
    "threshold": "mwm.localize.threshold:ThresholdLocalizer",
    "tiny": "mwm.localize.tiny:TinyLocalizer",
}
_SUMMARIES = {
    "bottleneck": "any text; M2IB on CLIP-like models: CLIP, SigLIP, dual encoders, open_clip (--checkpoint)",
    "clipseg": "any text; any CLIPSeg checkpoint, by hub name or local folder (--checkpoint)",
    "detector": "any text; boxes of Grounding DINO, OWLv2 or OWL-ViT as soft regions (--checkpoint)",
    "edges": "no text: where the image has many strong edges; a baseline",
    "gradcam": "any text; Grad-CAM on the models of bottleneck (--checkpoint); cheap and coarse",
    "gscorecam": "any text; gScoreCAM on the models of bottleneck (--checkpoint); one pass per scored channel",
    "maps": "no text: masks that you have, in a folder (--checkpoint) or the mask column of an index CSV",
    "threshold": "body or lungs by Otsu's threshold, no learning; a baseline, and where air ends",
    "tiny": "offline, a small vocabulary (--vocabulary): lungs in X-ray and CT, tumours in brain MRI",
}


def list_localizers() -> list[str]:
    """Names that `create_localizer` knows, sorted."""
    return sorted(_LOCALIZERS)


def describe_localizers() -> str:
    """One line per localizer, then one per preset: what `mwm localize --list` prints."""
    lines = [f"{name:10} {_SUMMARIES[name]}" for name in list_localizers()]
    return "\n".join([*lines, "", "presets, for --checkpoint (name, localizer, hub name and commit, download, licence of the weights; images):", describe_presets()])


def create_localizer(name: str, *, checkpoint: str | Path | None = None, device: Any = None, **settings: Any) -> Localizer:
    """Build a localizer by name.

    Args:
        name: One of `list_localizers()`.
        checkpoint: Preset, hub name or local folder of the weights, for localizers that have several ("bottleneck",
            "clipseg"); the folder of masks for "maps". Only what is named here is ever fetched.
        device: Where it runs; the first CUDA device where there is one, else the CPU.
        **settings: Further arguments of that localizer.

    Returns:
        A callable ``(images [B, C, H, W] in [0, 1], prompts) → float [B, H, W] in [0, 1]``.

    Raises:
        ValueError: the name is unknown, or the checkpoint is not one of that localizer's.
        TypeError: a setting is unknown.
    """
    if name not in _LOCALIZERS:
        hint = f" It is a preset: take {PRESETS[name].localizer} with checkpoint {name}." if name in PRESETS and PRESETS[name].localizer in _LOCALIZERS else ""
        raise ValueError(f"create_localizer: name must be one of {', '.join(list_localizers())}, got {name!r}.{hint}")
    module, attribute = _LOCALIZERS[name].split(":")
    kind = getattr(importlib.import_module(module), attribute)
    known = inspect.signature(kind).parameters
    unknown = [setting for setting in settings if setting not in known]
    if unknown:
        offered = sorted(set(known) - {"checkpoint", "device"})
        wanted = f"among {', '.join(offered)}" if offered else "left out, since it has none"
        raise TypeError(f"create_localizer: settings of {name} must be {wanted}, got {', '.join(unknown)}.")
    arguments = dict(settings)
    if "checkpoint" in known:
        if checkpoint is not None:
            arguments["checkpoint"] = checkpoint
        elif known["checkpoint"].default is inspect.Parameter.empty:
            raise ValueError(f"create_localizer: checkpoint must be given for {name}, got none. {getattr(kind, 'checkpoint_hint', '')}".strip())
    elif checkpoint is not None:
        raise ValueError(f"create_localizer: checkpoint must be left out for {name}, which brings its own weights, got {str(checkpoint)!r}. Use clipseg for other weights.")
    if "device" in known:
        arguments["device"] = device
    return kind(**arguments)
