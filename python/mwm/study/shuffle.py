"""The arm `shuffled`: each image gets the region of another image of its class and split, of another patient where one is there.

Every region is given away exactly once, so that areas, shapes, places and classes keep their distribution and only the bond between an image and its own
region is cut: what guided masking gains over this arm is due to localisation, not to hiding a compact thing of that size near the centre.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from mwm.data import DataError, ReadSettings, Record, RegionCache, content_digest, open_regions, read_list
from mwm.data.geometry import resize

VERSION = 1


@dataclass(frozen=True)
class Shuffled:
    """What `shuffle_regions` made; also in `regions.json`, under `meta.source`.

    Attributes:
        out: Folder of the regions.
        images: Images with a region.
        other_patient: Of these, how many got the region of another patient; the rest got one of another image of their patient.
        kept: Images that are alone with their class and split and had to keep their own region.
        overlap: Mean Dice between an image's own region and the one it got: what is left of localisation by chance (anatomy lies where it lies).
    """

    out: Path
    images: int
    other_patient: int
    kept: int
    overlap: float

    def __str__(self) -> str:
        return (f"regions: {self.images} images with the region of another one of their class and split, {self.other_patient} of another patient, {self.kept} with "
                f"their own for want of another; Dice with the own region {self.overlap:.3f}; in {self.out}")


def shuffle_regions(fold: str | Path, regions: str | Path, out: str | Path, *, root: str | Path | None = None, seed: int = 0, read: ReadSettings | None = None,
                    splits: Sequence[str] = ("train", "val", "unlabelled")) -> Shuffled:
    """Write a folder of regions in which every image has that of another.

    Args:
        fold: Index CSV with the columns file, split, label, patient.
        regions: What `--regions` takes: a folder of `mwm localize` or `crossfit_regions`, a folder of masks, or "masks".
        out: New folder of regions; one that holds the same shuffle is replaced by itself.
        root: Folder that the CSV's paths start from; its own where left out.
        seed: Of the shuffle.
        read: How the images are read.
        splits: Splits that are shuffled, each within itself.

    Raises:
        DataError: no image of these splits has a region, or `out` holds other files.
    """
    out, read = Path(out).expanduser(), read or ReadSettings()
    if out.is_dir() and any(out.iterdir()) and not (out / "regions.json").is_file():
        raise DataError(f"shuffle: out must be a new folder or one of regions, got {out}, which holds other files. Choose another.")
    store = open_regions(regions)
    records = [r for r in read_list(fold, root=root, settings=read) if r.split in splits and store.has(r)]
    if not records:
        raise DataError(f"shuffle: regions must hold those of the images in {', '.join(splits)}, got none. Make them for this fold first.")
    donors = derange(records, seed)
    cache = RegionCache(out)
    digests = [content_digest(r) for r in records]
    overlap, other, kept = [], 0, 0
    for place, record in enumerate(records):
        own, given = (store.region(records[k], read) for k in (place, donors[place]))
        size = tuple(own.shape)  # that of the image, or a mask's of the same picture
        region = _as_large(given, size)
        key = cache.key(digests[place], digests[donors[place]], f"shuffled {VERSION}", json.dumps([read.to_dict(), list(size)], sort_keys=True), _digest(region))
        cache.put(key, region)
        cache.assign(record.id, key)
        mine, theirs = own > 0.5, region > 0.5
        total = int(mine.sum() + theirs.sum())
        overlap.append(2 * int((mine & theirs).sum()) / total if total else 1.0)
        kept += donors[place] == place
        other += records[donors[place]].patient != record.patient or (record.patient is None and donors[place] != place)
    behind = dict(getattr(store, "meta", {}))
    facts = {"kind": "shuffled", "seed": seed, "images": len(records), "other_patient": other, "kept": kept, "overlap": fmean(overlap),
             "overlap_by_class": {name: round(fmean(o for o, r in zip(overlap, records, strict=True) if (r.label or "") == name), 4)
                                  for name in sorted({r.label or "" for r in records})},
             "of": behind.get("source") or {"localizer": behind.get("localizer"), "prompt": behind.get("prompt")}}
    pairs = hashlib.blake2b(json.dumps([digests[k] for k in donors]).encode(), digest_size=8).hexdigest()
    cache.meta = {"prompt": behind.get("prompt"), "localizer": f"shuffled v{VERSION} {seed} {pairs} of {behind.get('localizer') or 'masks'}", "refine": None,
                  "read": read.to_dict(), "source": facts}
    cache.save()
    return Shuffled(out, len(records), other, kept, facts["overlap"])


def derange(records: Sequence[Record], seed: int) -> list[int]:
    """Whose region each record gets: a permutation inside every (split, class), to another patient where a class has no patient with more than half of it.

    A random permutation, in which every pair of one patient is then swapped with another pair; where the halves allow it such a partner always exists. It
    depends on names, classes and patients, not on the order of the records.

    Args:
        records: Images with regions.
        seed: Of the permutation.

    Returns:
        Position of the donor, for each record. A record that is alone gets itself.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for place, record in enumerate(records):
        groups.setdefault((record.split or "", record.label or ""), []).append(place)
    donors = list(range(len(records)))
    for group in groups.values():
        members = sorted(group, key=lambda k: records[k].name)
        given = sorted(members, key=lambda k: _word(seed, records[k].name))
        for closeness in (_same_patient, _same_image):
            for i in range(len(members)):
                if closeness(records[members[i]], records[given[i]]):
                    for step in range(1, len(members)):
                        j = (i + step) % len(members)
                        if not closeness(records[members[i]], records[given[j]]) and not closeness(records[members[j]], records[given[i]]):
                            given[i], given[j] = given[j], given[i]
                            break
        for taker, donor in zip(members, given, strict=True):
            donors[taker] = donor
    return donors


def _same_patient(a: Record, b: Record) -> bool:
    return a.name == b.name or (a.patient is not None and a.patient == b.patient)


def _same_image(a: Record, b: Record) -> bool:
    return a.name == b.name


def _word(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _as_large(region: Tensor, size: tuple[int, ...]) -> Tensor:
    """A region of another image at this size; one of zeros and ones stays so."""
    if tuple(region.shape) == tuple(size):
        return region
    moved = resize(region[None], (size[0], size[1]))[0].clamp(0, 1)
    return (moved >= 0.5).float() if bool(((region == 0) | (region == 1)).all()) else moved


def _digest(region: Tensor) -> str:
    return hashlib.blake2b((region * 255).round().to(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()

