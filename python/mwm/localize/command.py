"""What `mwm localize` does: plain values in, files and a printed summary out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mwm.localize.folder import LocalizeReport, localize_folder
from mwm.localize.refine import RefineSettings
from mwm.localize.registry import create_localizer, describe_localizers


def run_localize(
    images: str | Path | None = None,
    prompt: str | None = None,
    out: str | Path = "regions",
    *,
    localizer: str = "tiny",
    checkpoint: str | Path | None = None,
    device: Any = None,
    split: str | None = None,
    root: str | Path | None = None,
    read: Any = None,
    batch_size: int = 8,
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
        device: Where the model runs.
        split: Only images of this split of an index CSV.
        root: Folder that the CSV's paths start from.
        read: `mwm.data.ReadSettings`; the defaults where left out.
        batch_size: Images of one size that are localized together.
        strict: Stop at the first file that cannot be read.
        progress: Show a progress bar.
        list: Print the localizers and stop.
        vocabulary: Print the words that "tiny" knows and stop.
        **refinement: Fields of `RefineSettings`; None stands for a field's default.

    Returns:
        The report, or None where something was only printed.

    Raises:
        ValueError: an argument does not fit, or the prompt matches nothing; one sentence each.
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
    own = {"read": read} if localizer == "maps" else {}  # masks of volumes are sliced like the images
    found = create_localizer(localizer, checkpoint=checkpoint, device=device, **own)
    report = localize_folder(
        images, prompt, found, out, RefineSettings(**given) if given else None,
        read=read, split=split, root=root, batch_size=batch_size, strict=strict, progress=progress,
    )
    print(report)
    return report
