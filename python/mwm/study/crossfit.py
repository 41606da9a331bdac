"""Regions of a supervised localizer by cross-fitting: no image is mapped by a network that saw a mask of its patient.

The masks of the fold's training rows are split by patient into K parts; localizer k learns from the masks of the other K - 1 parts and
maps the images of part k, unlabelled ones of its patients included. Images of other patients that a run may pre-train on (val, unlabelled) get the mean of the K
maps; their masks are not read. Test rows are not touched at all. The localizer is the network of `tiny` from scratch, not its shipped weights, which have seen patients that this
fold evaluates on. The result is a folder as `mwm localize` writes it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mwm.data import DataError, MissingRegion, ReadSettings, Record, RegionCache, UnreadableImage, content_digest, read_image, read_list, read_record_mask
from mwm.data.regions import INDEX
from mwm.localize.protocol import default_device
from mwm.localize.refine import RefineSettings, refine
from mwm.localize.tiny_text import parse_prompt
from mwm.study.crossfit_train import VERSION, FitSettings, fit_localizer, heat_maps, standard_image, standard_mask

LABEL = "supervised region source"
"""How every table names these regions: masks of the evaluated data set's training patients are behind them."""


@dataclass(frozen=True)
class Crossfit:
    """What `crossfit_regions` made; also in `regions.json`, under `meta.source`.

    Attributes:
        out: Folder of the regions.
        parts: K.
        dice: Mean Dice of the regions of training images against their masks, each by the localizer that never saw the patient.
        images: Images behind `dice`.
        facts: Everything in `meta.source`: Dice by part and class, shares of empty regions, patients, settings.
        seconds: Time of this call; about 0 where the folder was there already.
    """

    out: Path
    parts: int
    dice: float
    images: int
    facts: dict[str, Any]
    seconds: float

    def __str__(self) -> str:
        return (f"regions: {LABEL}, cross-fitted in {self.parts} parts by patient; Dice {self.dice:.3f} on {self.images} training images, each mapped by the "
                f"localizer that never saw its patient; {self.seconds:.1f} s, in {self.out}")


def crossfit_regions(
    fold: str | Path,
    out: str | Path,
    prompt: str,
    *,
    root: str | Path | None = None,
    parts: int = 3,
    seed: int = 0,
    device: Any = None,
    settings: FitSettings | None = None,
    refinement: RefineSettings | None = None,
    read: ReadSettings | None = None,
    others: Sequence[str] = ("val", "unlabelled"),
) -> Crossfit:
    """Make the regions of one fold; images that cannot be read get none, as pre-training leaves them out.

    Args:
        fold: Index CSV with the columns file, split, patient, mask, label; its `split` is that of the fold.
        out: Folder of the regions; where it holds those of the same call, nothing is done.
        prompt: What the masks show, in words of `tiny`'s vocabulary; the localizers read it.
        root: Folder that the CSV's paths start from; its own where left out.
        parts: K, the number of localizers.
        seed: Of the parts, the weights and the views.
        device: Where the localizers are trained; the first CUDA device where there is one, else the CPU.
        settings: How they are trained.
        refinement: How maps become regions; the defaults of `mwm localize` where left out.
        read: How images are read.
        others: Splits besides "train" whose images get a region, from the mean of all localizers.

    Returns:
        What was made; print it.

    Raises:
        DataError: a training row has no patient, a patient is in another split too, masks are missing, or there are fewer patients than parts.
        ValueError: the prompt is outside the vocabulary.
    """
    began = time.monotonic()
    out, refinement, read = Path(out).expanduser(), refinement or RefineSettings(), read or ReadSettings()
    settings = settings or FitSettings()
    if parse_prompt(prompt) in ("left_lung", "right_lung"):
        settings = replace(settings, mirror=False)
    if "test" in others:
        raise DataError("crossfit: others must leave out test, whose images no arm sees before the end.")
    records = [r for r in read_list(fold, root=root, settings=read) if r.split == "train" or r.split in others]
    train = [r for r in records if r.split == "train"]
    part_of = patient_parts(train, parts, seed)
    mixed = sorted({str(r.patient) for r in records if r.split not in ("train", "unlabelled") and r.patient in part_of})
    if mixed:
        raise DataError(f"crossfit: each patient must be in one split, got {len(mixed)} that are in train and in another (patient hash "
                        f"{hashlib.blake2b(mixed[0].encode(), digest_size=4).hexdigest()}). Split by patient.")
    learnt = [r for r in train if _learnt(r)]
    lacking = [k for k in range(parts) if not any(part_of[str(r.patient)] != k for r in learnt)]
    if lacking:
        raise DataError(f"crossfit: training rows must have masks in at least two of the {parts} parts, got {len(learnt)} masks. Fill the column mask.")
    seen = {r.name: content_digest(r) for r in records}
    told = {"version": VERSION, "parts": parts, "seed": seed, "prompt": prompt, "fit": asdict(settings), "refine": _refined(refinement), "read": read.to_dict(),
            "images": sorted((r.name, str(r.split), seen[r.name], str(r.patient)) for r in records),
            "masks": sorted((r.name, hashlib.blake2b(r.mask.read_bytes(), digest_size=16).hexdigest()) for r in learnt)}
    fingerprint = f"crossfit v{VERSION} {hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()}"
    ready = _ready(out, fingerprint, records)
    if ready is not None:
        return Crossfit(out, parts, ready["dice"], ready["images"], ready, time.monotonic() - began)
    where = default_device(device)
    images, unreadable = _read(records, read)
    records = [record for record in records if record.name in images]
    maps = _maps(records, images, part_of, parts, prompt, settings, read, seed, where)
    facts = _write(out, fingerprint, records, maps, [images[record.name][1] for record in records], part_of, refinement, seen,
                   {**({"unreadable": unreadable} if unreadable else {}), "parts": parts, "seed": seed, "prompt": prompt, "fit": asdict(settings), "device": where.type}, read)
    return Crossfit(out, parts, facts["dice"], facts["images"], facts, time.monotonic() - began)


def patient_parts(records: Sequence[Record], parts: int, seed: int) -> dict[str, int]:
    """The part of every patient: class by class, largest patients first, into the part with the fewest images of that class (then of all).

    Args:
        records: Training rows, each with a patient.
        parts: Number of parts, at least 2.
        seed: Decides between patients, and parts, of equal size.

    Raises:
        DataError: a row without a patient, or fewer patients than parts.
    """
    if isinstance(parts, bool) or not isinstance(parts, int) or parts < 2:
        raise DataError(f"crossfit: parts must be a whole number of at least 2, got {parts!r}.")
    nameless = sum(not r.patient for r in records)
    if nameless:
        raise DataError(f"crossfit: every training row must name its patient, got {nameless} of {len(records)} that do not. Fill the column patient; without it a "
                        "localizer could map a patient that it has seen.")
    sizes: dict[str, dict[str, int]] = {}
    for record in records:
        by_class = sizes.setdefault(str(record.patient), {})
        by_class[record.label or ""] = by_class.get(record.label or "", 0) + 1
    if len(sizes) < parts:
        raise DataError(f"crossfit: training rows must have at least as many patients as parts, got {len(sizes)} for {parts} parts. Lower parts.")

    def word(*what: Any) -> str:
        return hashlib.blake2b(json.dumps([seed, *what]).encode(), digest_size=8).hexdigest()

    main = {patient: min(counts, key=lambda label: (-counts[label], label)) for patient, counts in sizes.items()}
    queue = sorted(sizes, key=lambda p: (main[p], -sum(sizes[p].values()), word(p)))
    filled: list[dict[str, int]] = [{} for _ in range(parts)]
    chosen: dict[str, int] = {}
    for patient in queue:
        part = min(range(parts), key=lambda k: (filled[k].get(main[patient], 0), sum(filled[k].values()), word(main[patient], k)))
        chosen[patient] = part
        for label, count in sizes[patient].items():
            filled[part][label] = filled[part].get(label, 0) + count
    return chosen


def _read(records: list[Record], read: ReadSettings) -> tuple[dict[str, tuple[Tensor, tuple[int, int]]], list[str]]:
    """By name: what the network sees of an image, uint8 [SIZE, SIZE], and the image's height and width; and the names of those that cannot be read."""
    images, unreadable = {}, []
    for record in records:
        try:
            image = read_image(record, read)
        except UnreadableImage:
            unreadable.append(record.name)
        else:
            images[record.name] = standard_image(image), (int(image.shape[1]), int(image.shape[2]))
    return images, unreadable


def _maps(records: list[Record], images: dict[str, tuple[Tensor, tuple[int, int]]], part_of: dict[str, int], parts: int, prompt: str, settings: FitSettings,
          read: ReadSettings, seed: int, device: torch.device) -> Tensor:
    """Heat maps of all records on the CPU. float32 [N, SIZE, SIZE]"""
    masks, shown = {}, False
    for place, record in enumerate(records):
        if _learnt(record):
            mask = read_record_mask(record.mask, record, read)
            shown |= bool((mask > 0.5).any())
            masks[place] = standard_mask(mask)  # full masks of thousands of X-rays would not fit
    if not shown:
        raise MissingRegion("crossfit: training masks must show something, got empty ones only. Check the column mask.")
    resident = torch.stack([images[record.name][0] for record in records]).to(device)
    targets = torch.zeros_like(resident)
    for place, mask in masks.items():
        targets[place] = mask.to(device)
    # Unlabelled images of a training patient go with the patient: the others' mean would hold localizers that saw it.
    part = torch.tensor([part_of.get(str(r.patient), -1) if r.split in ("train", "unlabelled") else -1 for r in records])
    known = torch.tensor([place in masks for place in range(len(records))])
    total = torch.zeros(resident.shape, dtype=torch.float32, device=device)
    with _deterministic():
        for k in range(parts):
            rows = torch.nonzero(known & (part != k) & (part >= 0)).flatten().to(device)
            model = fit_localizer(resident[rows], targets[rows], prompt, settings, seed * 1000 + k)
            own, rest = (torch.nonzero(part == which).flatten().to(device) for which in (k, -1))
            total[own] = heat_maps(model, resident[own], prompt, settings)
            total[rest] += heat_maps(model, resident[rest], prompt, settings) / parts
    return total.cpu()


def _refined(refinement: RefineSettings) -> dict[str, Any]:
    """The refinement for the hash; settings that came later are left out where they are not used, so that regions of before stay those of these settings."""
    return {name: value for name, value in refinement.to_dict().items() if name not in ("crf", "fill", "blur") or value}


def _learnt(record: Record) -> bool:
    """Whether a localizer may learn from the mask of a row."""
    return record.split == "train" and record.mask is not None


def _write(out: Path, fingerprint: str, records: list[Record], maps: Tensor, sizes: list[tuple[int, int]], part_of: dict[str, int],
           refinement: RefineSettings, seen: dict[str, str], told: dict[str, Any], read: ReadSettings) -> dict[str, Any]:
    """Put the regions on disk, the index last, so that a cut call leaves nothing that looks finished."""
    cache = RegionCache(out)
    dice: dict[int, float] = {}
    empty = 0
    for place, (record, size) in enumerate(zip(records, sizes, strict=True)):
        heat = F.interpolate(maps[place][None, None], size, mode="bilinear", align_corners=False)[0, 0].clamp(0, 1)
        region = refine(heat, refinement)
        key = cache.key(seen[record.name], fingerprint, record.name)
        cache.put(key, region)
        cache.assign(record.id, key)
        empty += not bool(region.any())
        if _learnt(record) and bool((mask := read_record_mask(record.mask, record, read) > 0.5).any()):
            dice[place] = _dice(region > 0, mask)
    part = {place: part_of[str(records[place].patient)] for place in dice}
    by = lambda name: {str(key): round(fmean(v for p, v in dice.items() if name(p) == key), 4) for key in sorted({name(p) for p in dice})}  # noqa: E731
    facts = {"kind": LABEL, "cross-fitted": True, **told, "dice": fmean(dice.values()), "dice_median": median(dice.values()),
             "missed": fmean(value < 0.1 for value in dice.values()), "images": len(dice), "patients": len({records[p].patient for p in dice}),
             "dice_by_part": by(part.__getitem__), "dice_by_class": by(lambda p: records[p].label or ""), "regions": len(records), "empty": empty}
    cache.meta = {"prompt": told["prompt"], "localizer": fingerprint, "refine": refinement.to_dict(), "read": read.to_dict(), "source": facts}
    cache.save()
    return cache.meta["source"]


def _ready(out: Path, fingerprint: str, records: list[Record]) -> dict[str, Any] | None:
    """The facts of an earlier, finished call with the same images, masks and settings."""
    if not out.is_dir():
        return None
    if not (out / INDEX).is_file():
        if any(path.name[:1] != "." and not (len(path.name) == 2 and path.is_dir()) for path in out.iterdir()):
            raise DataError(f"crossfit: out must be a new folder or one of regions, got {out}, which holds other files. Choose another.")
        return None
    cache = RegionCache(out)
    if cache.meta.get("localizer") != fingerprint:
        raise DataError(f"crossfit: {out} must hold the regions of these images, masks and settings, got those of others. Remove it, or choose another folder.")
    unreadable = set(cache.meta["source"].get("unreadable", ()))
    return cache.meta["source"] if all(cache.has(record) or record.name in unreadable for record in records) else None


def _dice(found: Tensor, truth: Tensor) -> float:
    """bool [H, W] twice; the mask is not empty."""
    if truth.shape != found.shape:
        truth = F.interpolate(truth[None, None].float(), found.shape, mode="nearest")[0, 0] > 0.5
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()).clamp(min=1))


class _deterministic:
    """cuDNN's deterministic convolutions for the time of the training."""

    def __enter__(self) -> None:
        self.before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False

    def __exit__(self, *_: Any) -> None:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = self.before
