"""Reading CLIP-like models as towers.

`load_tower` reads `CLIPModel`, `SiglipModel` and `VisionTextDualEncoderModel` of transformers, and models of open_clip, from a local folder or by hub name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mwm.localize.checkpoints import content_hash, hub_answers, local_folder
from mwm.localize.protocol import default_device
from mwm.localize.tower import OPEN_CLIP_CONFIG, Tower

_EXAMPLE = "openai/clip-vit-base-patch16"


def load_tower(checkpoint: str | Path, device: Any = None, *, name: str = "bottleneck", offline: bool = False, trust_remote_code: bool = False,
               revision: str | None = None) -> Tower:
    """Read a CLIP-like model.

    Weights are read from safetensors; of open_clip models also from .bin files, as bare tensors, since BiomedCLIP comes in no other form.

    Args:
        checkpoint: A folder that `save_pretrained` wrote, or one with open_clip_config.json and weights, or a hub name. "hf-hub:owner/model" is an open_clip model.
        device: Where it runs; the first CUDA device where there is one, else the CPU.
        name: The localizer, for messages.
        offline: Use only what is on disk.
        trust_remote_code: Let transformers run code that comes with the checkpoint.
        revision: Commit, branch or tag of a hub name.

    Raises:
        ValueError: the checkpoint is no such model, is not there, or cannot be fetched; open_clip is needed and not installed.
    """
    place = default_device(device)
    text = str(checkpoint)
    folder = local_folder(text.removeprefix("hf-hub:"), name, _EXAMPLE, ("config.json", OPEN_CLIP_CONFIG))
    source = str(folder) if folder else text.removeprefix("hf-hub:")
    local_only = offline or folder is not None or not hub_answers()
    if text.startswith("hf-hub:") or _is_open_clip(folder, source, local_only, revision):
        from mwm.localize.towers_open_clip import read
    else:
        from mwm.localize.towers_transformers import read
    tower, commit = read(source, name=name, device=place, local_only=local_only, trust_remote_code=trust_remote_code, revision=revision)
    tower.device, tower.mean, tower.std = place, tower.mean.to(place), tower.std.to(place)
    tower.fingerprint = content_hash(folder) if folder else f"{source}@{commit}"
    tower.check(name)
    return tower


def _is_open_clip(folder: Path | None, source: str, local_only: bool, revision: str | None) -> bool:
    """Whether a checkpoint is one of open_clip's; a hub model may be both, and then transformers reads it."""
    if folder is not None:
        return (folder / OPEN_CLIP_CONFIG).is_file() and not (folder / "model.safetensors").is_file()
    from huggingface_hub import file_exists, try_to_load_from_cache

    if local_only:
        return isinstance(try_to_load_from_cache(source, OPEN_CLIP_CONFIG, revision=revision), str)
    try:
        return file_exists(source, OPEN_CLIP_CONFIG, revision=revision) and not file_exists(source, "model.safetensors", revision=revision)
    except Exception:  # whatever is wrong, the reader that follows says it in its own words
        return False
