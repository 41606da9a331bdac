"""Regions of a whole folder: threads read, the localizer takes batches, a thread refines and writes; a second run finds everything done."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mwm.data import DataError, ReadSettings, Record, RegionCache, SkippedFiles, content_digest, read_image, read_list
from mwm.data.regions import INDEX
from mwm.localize.protocol import Localizer, UnsupportedImage
from mwm.localize.ranks import Ranks
from mwm.localize.refine import RefineSettings, refine
from mwm.localize.region_report import FILE, RegionReport
from mwm.localize.registry import create_localizer
from mwm.localize.stream import Batches, Behind, read_ahead
from mwm.localize.training import source_line

NOTHING_FOUND = 0.98
"""Share of empty regions from which a prompt counts as matching nothing."""

_NOT_SEEN = ("aspect", "size", "max_pixels")  # reading settings that do not change an image at its own size
_PATIENCE = 16  # refused images, with none accepted, after which a folder is given up
_OURS = ("skipped.csv", FILE)


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
        kept: Parts that SAM's answer did not fit, kept as the localizer found them.
        source: What the localizer learnt from, as `meta.source` of the folder says it; empty where nothing is known to be behind it but its text.
        regions: Figures of the regions and maps, which `report.json` in `out` holds.
    """

    out: Path
    images: int
    made: int
    empty: int
    full: int
    area: float
    skipped: int
    kept: int = 0
    source: dict[str, Any] = field(default_factory=dict)
    regions: RegionReport = field(default_factory=RegionReport, compare=False, repr=False)

    def __str__(self) -> str:
        share = "–" if self.area != self.area else f"{100 * self.area:.1f} %"
        lines = [
            f"regions: {self.images} images, {self.made} computed, {self.images - self.made} from the cache, in {self.out}",
            f"         {self.empty} empty, {self.full} cover the whole image; the others cover {share} of the image on average",
        ]
        if line := source_line(self.source):
            lines.append(line)
        if self.kept:
            lines.append(f"sam:     {self.kept} parts kept as they were: what the model drew did not fit them")
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
    workers: int = 2,
    sam: Any = None,
    strict: bool = False,
    progress: bool = True,
) -> LocalizeReport:
    """Find the region of every image and keep it on disk.

    A region is cached under a hash of the image's bytes, the prompt, the localizer's fingerprint and the settings, so that
    a second run, a run over more images, or one that was killed computes only what is missing. A region is visible when it is whole.
    Neither file names nor texts of headers are written into `out`, except the relative names of skipped files in `skipped.csv`.
    Under torchrun each process takes its share of the images; the index holds those of all. Memory does not grow with the number of
    images, but for some 200 bytes of index each.

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
        workers: Threads that read images ahead of the localizer; 0 reads between its calls.
        sam: A `SamRefiner` that redraws the parts of each region, between its components and its boxes.
        strict: Stop at the first file that cannot be read, instead of skipping it.
        progress: Show a progress bar.

    Returns:
        What was done, by all processes; print it.

    Raises:
        ValueError: there is no prompt, the prompt matches nothing, or the localizer refuses prompt or images.
        DataError: there are no images, or (with `strict`) one cannot be read.
    """
    localizer = create_localizer(localizer) if isinstance(localizer, str) else localizer
    read = replace(read or ReadSettings(), size=None)  # regions keep the size of the file; data sets bring both to size
    if batch_size < 1:
        raise ValueError(f"localize: batch_size must be at least 1, got {batch_size}.")
    if workers < 0:
        raise ValueError(f"localize: workers must be at least 0, got {workers}.")
    _check_out(Path(out).expanduser())
    records = list(read_list(images, split=split, root=root, settings=read))
    _check_prompts(records, prompt, localizer)
    ranks = Ranks.join()
    try:
        cache = RegionCache(out)
        if ranks.is_main:
            cache.sweep()
        run = _Run(localizer, prompt, refinement, read, cache, strict, sam)
        try:
            run.all(ranks.share(records), batch_size, workers, progress and ranks.is_main)
        finally:  # what was made stays usable whatever happens
            run.write(Path(out), ranks)
        return run.report(Path(out), ranks)
    finally:
        ranks.leave()


def _check_out(folder: Path) -> None:
    """Regions belong in a folder of their own: poured over a run they would replace its list of skipped files."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise DataError(f"localize: out must be a folder, got {folder}, which is a file or a link to nowhere. Choose another --out.")
    if not folder.is_dir() or (folder / INDEX).is_file():
        return
    # What an interrupted first call leaves: folders of two letters, parts of an index or none.
    if any(path.name not in _OURS and not (len(path.name) == 2 and path.is_dir()) and not RegionCache.is_part(path) for path in folder.iterdir()):
        raise DataError(f"localize: out must be a new folder or one of regions, got {folder}, which holds other files. Choose another --out.")


@dataclass
class _Counts:
    """What one process did; sums over processes."""

    made: int = 0
    images: int = 0
    empty: int = 0
    full: int = 0
    area: float = 0.0
    kept: int = 0
    refused: int = 0
    reason: str = ""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    report: RegionReport = field(default_factory=RegionReport)

    def __add__(self, other: _Counts) -> _Counts:
        self.report.merge(other.report)
        return _Counts(self.made + other.made, self.images + other.images, self.empty + other.empty, self.full + other.full, self.area + other.area, self.kept + other.kept,
                       self.refused + other.refused, other.reason or self.reason, self.skipped + other.skipped, self.report)


@dataclass
class _Missing:
    """An image that has no region yet."""

    record: Record
    text: str
    key: str
    image: Tensor
    heat: Tensor | None = None
    similarity: float | None = None


class _Run:
    """The counters of one call and its work."""

    def __init__(
        self, localizer: Localizer, prompt: str | None, refinement: RefineSettings | None, read: ReadSettings, cache: RegionCache, strict: bool, sam: Any = None
    ) -> None:
        self.localizer, self.prompt, self.read, self.cache, self.strict, self.sam = localizer, prompt, read, cache, strict, sam
        # The masks of a user are regions already; heat maps are not.
        self.refinement = refinement if refinement or getattr(localizer, "gives_regions", False) else RefineSettings()
        self.refine_settings = self.refinement.to_dict() if self.refinement else None
        seen = {name: value for name, value in read.to_dict().items() if name not in _NOT_SEEN}
        parts = [localizer.fingerprint, self.refine_settings, seen] + ([sam.fingerprint] if sam else [])
        self.settings = json.dumps(parts, sort_keys=True)
        training = getattr(localizer, "training", None)
        self.source: dict[str, Any] = training.source() if training else {}
        self.skipped = SkippedFiles()
        self.counts = _Counts()
        self._kept_before = sam.kept if sam else 0
        self._counting = threading.Lock()
        self._volumes = threading.Lock()  # slices of one volume share its decoding, which several threads at once would repeat

    def all(self, records: list[Record], batch_size: int, workers: int, progress: bool) -> None:
        """Make what is missing and count everything."""
        batches: Batches[_Missing] = Batches(batch_size)
        bar = tqdm(total=len(records), desc="localize", unit="image", disable=None if progress else True)
        early = closing(read_ahead(self._texts(records), self._read, workers=workers, ahead=max(workers, batch_size)))
        with bar, early as images, Behind(self._written, workers=min(workers, 1), most=batch_size) as behind:
            for (record, _), found in images:
                bar.update()
                if isinstance(found, (DataError, OSError)) and not self.strict:
                    self.skipped.add(record.name, str(found))
                elif isinstance(found, Exception):
                    raise found
                elif isinstance(found, _Missing):
                    full = batches.add(tuple(found.image.shape), found)
                    if full:
                        self._make(full, behind)
                        self._stop_early()
                else:
                    self._assign(record, *found)
            for rest in batches.rest():
                self._make(rest, behind)
                self._stop_early()

    def _texts(self, records: list[Record]) -> Iterator[tuple[Record, str | Exception]]:
        """Each record with what points at its region: what the localizer takes from it, else the row's prompt, else the common one."""
        chosen = getattr(self.localizer, "prompt_for", None)
        for record in records:
            try:
                text: str | Exception = chosen(record) if chosen else record.prompt or self.prompt or ""
            except (DataError, OSError) as error:
                text = error
            yield record, text

    def _read(self, item: tuple[Record, str | Exception]) -> _Missing | tuple[str, float]:
        """In a thread: the image where it has no region yet, else key and area of its region."""
        record, text = item
        if isinstance(text, Exception):
            raise text
        key = self._key(record, text)
        try:
            return key, self._measured(self.cache.get(key))
        except KeyError:  # not there, or damaged: made again
            pass
        if record.frame is None:
            return _Missing(record, text, key, read_image(record, self.read))
        with self._volumes:
            return _Missing(record, text, key, read_image(record, self.read))

    def _make(self, group: list[_Missing], behind: Behind) -> None:
        """Localize images of one size; one that the localizer refuses does not take the others along."""
        images = torch.stack([one.image for one in group])
        try:
            heat = self.localizer(images, [one.text for one in group]).detach().cpu()
        except UnsupportedImage as error:
            if len(group) > 1:
                for one in group:
                    self._make([one], behind)
                return
            if self.strict:
                raise
            self.counts.refused, self.counts.reason = self.counts.refused + 1, str(error)
            self.skipped.add(group[0].record.name, str(error))
            return
        told = getattr(self.localizer, "similarity", None)
        cosines = [None] * len(group) if told is None else told.tolist()
        for one, found, cosine in zip(group, heat, cosines, strict=True):
            one.heat, one.similarity = None if getattr(self.localizer, "gives_regions", False) else found, cosine
            if self.sam is None:
                behind.submit(lambda one=one, found=found: self._finish(one, found, self.refinement))
                continue
            try:
                before = refine(found, self.refinement.before_sam(), one.image) if self.refinement else found
                drawn = self.sam(one.image[None], before[None])[0]
            except ValueError as error:
                self._written((one.record, error))
                continue
            after = (self.refinement or RefineSettings()).after_sam()
            behind.submit(lambda one=one, drawn=drawn, after=after: self._finish(one, drawn, after))

    def _finish(self, one: _Missing, found: Tensor, settings: RefineSettings | None) -> tuple[Record, Any]:
        """In a thread: refine one map and write its region."""
        try:
            region = refine(found, settings, one.image) if settings else found
            grid = getattr(self.localizer, "map_grid", None) if settings and settings.soft and not settings.crf else None
            self.cache.put(one.key, region, surface=found, grid=grid)
        except ValueError as error:  # NaN: this image only
            return one.record, error
        return one.record, (one.key, self._measured(region, one.heat, one.similarity))

    def _measured(self, region: Tensor, heat: Tensor | None = None, similarity: float | None = None) -> float:
        """In a thread: share of the image that a region covers; its figures go into the report."""
        with self._counting:
            self.counts.report.add(region, heat, similarity)
        return float((region > 0).double().mean())

    def _written(self, outcome: tuple[Record, Any]) -> None:
        record, result = outcome
        if isinstance(result, Exception):
            if self.strict:
                raise result
            self.skipped.add(record.name, str(result))
            return
        self._assign(record, *result)
        self.counts.made += 1

    def _assign(self, record: Record, key: str, area: float) -> None:
        self.cache.assign(record.id, key)
        self.counts.images += 1
        self.counts.empty += area == 0
        self.counts.full += area == 1
        self.counts.area += area

    def _key(self, record: Record, prompt: str) -> str:
        """Hash of the image's bytes, the prompt (for masks: their bytes) and the settings."""
        evidence = getattr(self.localizer, "evidence", None)
        return self.cache.key(content_digest(record), evidence(prompt) if evidence else prompt, self.settings)

    def _stop_early(self) -> None:
        """Give up on a folder that the localizer was not made for, instead of refusing it image by image."""
        if self.counts.refused >= _PATIENCE and not self.counts.images:
            raise ValueError(f"localize: the localizer refuses these images; the last reason: {self.counts.reason}")

    def write(self, out: Path, ranks: Ranks) -> None:
        """The index, of this process alone where there are several, and the list of skipped files where there is one."""
        if self.counts.images:
            self.cache.meta.update(prompt=self.prompt, localizer=self.localizer.fingerprint, refine=self.refine_settings, read=self.read.to_dict())
            self.cache.meta.pop("source", None)  # of whatever made the folder before
            self.cache.meta.update({"source": self.source} if self.source else {})
            if self.sam or "sam" in self.cache.meta:
                self.cache.meta["sam"] = self.sam.fingerprint if self.sam else None
            self.cache.save(part=None if ranks.size == 1 else (ranks.rank, ranks.size))
        elif ranks.size > 1:
            self.cache.drop_part((ranks.rank, ranks.size))
        if ranks.size == 1:
            self._write_skipped(out, self.skipped)

    def report(self, out: Path, ranks: Ranks) -> LocalizeReport:
        """The report of all processes, or one sentence where the whole run was in vain."""
        self.counts.skipped = self.skipped.rows
        self.counts.kept = self.sam.kept - self._kept_before if self.sam else 0
        counts = sum(ranks.gather(self.counts), _Counts())
        if ranks.size > 1:
            if ranks.is_main:
                RegionCache(out).merge(ranks.size)
                skipped = SkippedFiles()
                skipped.rows = sorted(counts.skipped)
                self._write_skipped(out, skipped)
        if ranks.is_main and counts.images and (counts.made or not (out / FILE).is_file()):  # figures of maps exist only when they are computed
            counts.report.write(out, **({"source": self.source} if self.source else {}))
        if ranks.size > 1:
            ranks.gather(None)  # nobody goes on before the index is there
        if not counts.images:
            reason = counts.reason or f"each one was skipped, for reasons that {out / 'skipped.csv'} lists. Look there first."
            raise ValueError(f"localize: no image has a region: {reason}")
        if counts.empty >= NOTHING_FOUND * counts.images:
            said = f"prompt {self.prompt!r} matches" if self.prompt is not None else "prompts match"
            raise ValueError(f"localize: the {said} nothing: {counts.empty} of {counts.images} regions are empty. Reword it, lower the threshold "
                             "(look at a few images with mwm preview), or take another localizer.")
        found = counts.images - counts.empty
        return LocalizeReport(out, counts.images, counts.made, counts.empty, counts.full, counts.area / found, len(counts.skipped), counts.kept, self.source, counts.report)

    @staticmethod
    def _write_skipped(out: Path, skipped: SkippedFiles) -> None:
        if len(skipped):
            out.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            skipped.write(out / "skipped.csv")


def _check_prompts(records: list[Record], prompt: str | None, localizer: Localizer) -> None:
    """Refuse images without a text before anything is computed."""
    if hasattr(localizer, "prompt_for"):
        return
    lacking = sum(not (record.prompt or prompt or "").strip() for record in records)
    if lacking:
        raise ValueError(f"localize: prompt must be given, got none for {lacking} of {len(records)} images. Add --prompt TEXT, or fill the column prompt of the index CSV.")
