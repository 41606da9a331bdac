"""Regions of a whole folder: stream the images, localize, refine, cache; a second run finds everything done."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mwm.data import DataError, ReadSettings, Record, RegionCache, SkippedFiles, content_digest, read_image, read_list
from mwm.data.regions import INDEX
from mwm.localize.protocol import Localizer, UnsupportedImage
from mwm.localize.refine import RefineSettings, refine
from mwm.localize.registry import create_localizer

NOTHING_FOUND = 0.98
"""Share of empty regions from which a prompt counts as matching nothing."""

_NOT_SEEN = ("aspect", "size", "max_pixels")  # reading settings that do not change an image at its own size
_PATIENCE = 16  # refused images, with none accepted, after which a folder is given up


@dataclass(frozen=True)
class LocalizeReport:
    """What `localize_folder` did.

    Attributes:
        out: Folder of the regions, which `mwm pretrain --regions` takes.
        images: Images that have a region now.
        made: Regions computed by this call; the others were found in the cache.
        empty: Regions without a pixel.
        full: Regions that cover the whole image.
        area: Mean share of the image that a non-empty region covers; NaN where all are empty.
        skipped: Files that could not be read; listed in skipped.csv in `out`.
    """

    out: Path
    images: int
    made: int
    empty: int
    full: int
    area: float
    skipped: int

    def __str__(self) -> str:
        share = "–" if self.area != self.area else f"{100 * self.area:.1f} %"
        lines = [
            f"regions: {self.images} images, {self.made} computed, {self.images - self.made} from the cache, in {self.out}",
            f"         {self.empty} empty, {self.full} cover the whole image; the others cover {share} of the image on average",
        ]
        if self.full:
            lines.append("warning: a region that covers the whole image guides nothing. Raise the threshold, keep fewer components, or expand less.")
        if self.skipped:
            lines.append(f"skipped: {self.skipped} files, listed in {self.out / 'skipped.csv'}")
        return "\n".join(lines)


def localize_folder(
    images: str | Path,
    prompt: str | None = None,
    localizer: Localizer | str = "tiny",
    out: str | Path = "regions",
    refinement: RefineSettings | None = None,
    *,
    read: ReadSettings | None = None,
    split: str | None = None,
    root: str | Path | None = None,
    batch_size: int = 8,
    strict: bool = False,
    progress: bool = True,
) -> LocalizeReport:
    """Find the region of every image and keep it on disk.

    A region is cached under a hash of the image's bytes, the prompt, the localizer's fingerprint and the settings, so that
    a second run, a run over more images, or one that was interrupted computes only what is missing. Neither file names
    nor texts of headers are written into `out`, except the relative names of skipped files in `skipped.csv`.

    Args:
        images: Folder, glob, text list or index CSV; see `mwm.data.read_list`.
        prompt: Text for every image; the `prompt` column of an index CSV goes before it, row by row.
        localizer: A localizer, or its name.
        out: Folder of the regions; made where it is missing.
        refinement: How maps become regions; None for the defaults (for masks of "maps": taken as they are).
        read: How images are read; the defaults where left out.
        split: Only images of this split of an index CSV.
        root: Folder that the CSV's paths start from, and must stay in.
        batch_size: Images of one size that are localized together.
        strict: Stop at the first file that cannot be read, instead of skipping it.
        progress: Show a progress bar.

    Returns:
        What was done; print it.

    Raises:
        ValueError: there is no prompt, the prompt matches nothing, or the localizer refuses prompt or images.
        DataError: there are no images, or (with `strict`) one cannot be read.
    """
    localizer = create_localizer(localizer) if isinstance(localizer, str) else localizer
    read = replace(read or ReadSettings(), size=None)  # regions keep the size of the file; data sets bring both to size
    if batch_size < 1:
        raise ValueError(f"localize: batch_size must be at least 1, got {batch_size}.")
    _check_out(Path(out).expanduser())
    records = list(read_list(images, split=split, root=root, settings=read))
    _check_prompts(records, prompt, localizer)
    cache = RegionCache(out)
    run = _Run(localizer, prompt, refinement, read, cache, strict)
    bar = tqdm(total=len(records), desc="localize", unit="image", disable=None if progress else True)
    try:
        with bar:
            for start in range(0, len(records), batch_size):
                chunk = records[start : start + batch_size]
                run.chunk(chunk)
                bar.update(len(chunk))
                run.stop_early()
    finally:  # what was made stays usable whatever happens
        if run.areas:
            cache.meta.update(prompt=prompt, localizer=localizer.fingerprint, refine=run.refine_settings, read=read.to_dict())
            cache.save()
        if len(run.skipped):
            Path(out).mkdir(parents=True, exist_ok=True)
        if Path(out).is_dir():
            run.skipped.write(Path(out) / "skipped.csv")
    return run.report(Path(out))


def _check_out(folder: Path) -> None:
    """Regions belong in a folder of their own: poured over a run they would replace its list of skipped files."""
    if not folder.is_dir() or (folder / INDEX).is_file():
        return
    # What an interrupted first call leaves: folders of two letters, no index yet.
    if any(path.name != "skipped.csv" and not (len(path.name) == 2 and path.is_dir()) for path in folder.iterdir()):
        raise DataError(f"localize: out must be a new folder or one of regions, got {folder}, which holds other files. Choose another --out.")


class _Run:
    """The counters of one call and the work on one chunk of images."""

    def __init__(self, localizer: Localizer, prompt: str | None, refinement: RefineSettings | None, read: ReadSettings, cache: RegionCache, strict: bool) -> None:
        self.localizer, self.prompt, self.read, self.cache, self.strict = localizer, prompt, read, cache, strict
        # The masks of a user are regions already; heat maps are not.
        self.refinement = refinement if refinement or getattr(localizer, "gives_regions", False) else RefineSettings()
        self.refine_settings = self.refinement.to_dict() if self.refinement else None
        seen = {name: value for name, value in read.to_dict().items() if name not in _NOT_SEEN}
        self.settings = json.dumps([localizer.fingerprint, self.refine_settings, seen], sort_keys=True)
        self.skipped = SkippedFiles()
        self.refused: list[str] = []
        self.made = 0
        self.areas: list[float] = []

    def chunk(self, records: list[Record]) -> None:
        """Make what is missing and count everything."""
        missing: dict[tuple[int, ...], list[tuple[Record, str, str, Tensor]]] = {}
        for record in records:
            try:
                text = self._text(record)
                key = self._key(record, text)
                region = self._cached(key)
                if region is None:
                    image = read_image(record, self.read)
                    missing.setdefault(tuple(image.shape), []).append((record, text, key, image))
                    continue
            except (DataError, OSError) as error:
                if self.strict:
                    raise
                self.skipped.add(record.name, str(error))
                continue
            self._assign(record, key, region)
        for group in missing.values():
            self._make(group)

    def _text(self, record: Record) -> str:
        """What points at the region: what the localizer takes from the record, else the row's prompt, else the common one."""
        chosen = getattr(self.localizer, "prompt_for", None)
        return chosen(record) if chosen else record.prompt or self.prompt

    def _cached(self, key: str) -> Tensor | None:
        try:
            return self.cache.get(key)
        except KeyError:  # not there, or damaged: made again
            return None

    def _make(self, group: list[tuple[Record, str, str, Tensor]]) -> None:
        """Localize images of one size; one that the localizer refuses does not take the others along."""
        try:
            heat = self.localizer(torch.stack([image for *_, image in group]), [prompt for _, prompt, *_ in group])
        except UnsupportedImage as error:
            if len(group) > 1:
                for one in group:
                    self._make([one])
                return
            if self.strict:
                raise
            self.refused.append(str(error))
            self.skipped.add(group[0][0].name, str(error))
            return
        for (record, _, key, _), one in zip(group, heat.cpu(), strict=True):
            try:
                region = refine(one, self.refinement) if self.refinement else one
            except ValueError as error:  # NaN: this image only
                if self.strict:
                    raise
                self.skipped.add(record.name, str(error))
                continue
            self.cache.put(key, region)
            self._assign(record, key, region)
            self.made += 1

    def _assign(self, record: Record, key: str, region: Tensor) -> None:
        self.cache.assign(record.id, key)
        self.areas.append(float((region > 0).double().mean()))

    def _key(self, record: Record, prompt: str) -> str:
        """Hash of the image's bytes, the prompt (for masks: their bytes) and the settings."""
        evidence = getattr(self.localizer, "evidence", None)
        return self.cache.key(content_digest(record), evidence(prompt) if evidence else prompt, self.settings)

    def stop_early(self) -> None:
        """Give up on a folder that the localizer was not made for, instead of refusing it image by image."""
        if len(self.refused) >= _PATIENCE and not self.areas:
            raise ValueError(f"localize: the localizer refuses these images; the last reason: {self.refused[-1]}")

    def report(self, out: Path) -> LocalizeReport:
        """The report, or one sentence where the whole run was in vain."""
        if not self.areas:
            reason = self.refused[-1] if self.refused else f"each one was skipped, for reasons that {out / 'skipped.csv'} lists. Look there first."
            raise ValueError(f"localize: no image has a region: {reason}")
        empty = sum(area == 0 for area in self.areas)
        if empty >= NOTHING_FOUND * len(self.areas):
            said = f"prompt {self.prompt!r} matches" if self.prompt is not None else "prompts match"
            raise ValueError(f"localize: the {said} nothing: {empty} of {len(self.areas)} regions are empty. Reword it, lower the threshold "
                             "(look at a few images with mwm preview), or take another localizer.")
        found = [area for area in self.areas if area > 0]
        return LocalizeReport(out, len(self.areas), self.made, empty, sum(area == 1 for area in self.areas), sum(found) / len(found), len(self.skipped))


def _check_prompts(records: list[Record], prompt: str | None, localizer: Localizer) -> None:
    """Refuse images without a text before anything is computed."""
    if hasattr(localizer, "prompt_for"):
        return
    lacking = sum(not (record.prompt or prompt or "").strip() for record in records)
    if lacking:
        raise ValueError(f"localize: prompt must be given, got none for {lacking} of {len(records)} images. Add --prompt TEXT, or fill the column prompt of the index CSV.")
