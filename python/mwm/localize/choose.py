"""Choosing settings: without labels by agreement and stability, or with masks by Dice. Never both: what was chosen with masks says so.

Without labels, three things that a good region has and a bad one may lack, measured on the same images for every candidate:

* agreement: paraphrases of one prompt give the same region;
* stability: a slightly darker, noisier copy of the image gives the same region, and so does another seed where the localizer draws noise.

Both are Dice within an image, corrected for chance by the Dice between regions of *different* images under the same settings, (within - between) / (1 - between):
a region that is always the same place, or always everything, agrees with itself perfectly and says nothing, and gets 0. The score is the mean of the two.
Two empty regions, and two full ones, agree on nothing and are not compared, nor do they count as different images: else a cut that leaves more images empty would
look more stable. An image that the localizer refuses under some settings has an empty region under these, so that all candidates answer for the same images.
Candidates that leave more than half of the regions empty or full are out. A high score is no proof of the right place: look at `mwm localize check` and at the regions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mwm.data import MaskFolder, ReadSettings, Record, match_size, read_image, read_record_mask
from mwm.localize.ensemble import maps_of
from mwm.localize.protocol import Localizer, UnsupportedImage
from mwm.localize.refine import RefineSettings, refine

REFINE = tuple(field.name for field in fields(RefineSettings))
PARAPHRASES = 5
"""Sentences of a set that are compared; more cost time and tell little."""

_GRID = 128  # edge to which regions of all images are brought, to be compared with each other
_USELESS = 0.5


@dataclass(frozen=True)
class Candidate:
    """Settings to be judged.

    Attributes:
        refine: Fields of `RefineSettings`.
        localizer: Settings of the localizer.
        level: Level of the prompt set, or None.
    """

    refine: tuple[tuple[str, Any], ...] = ()
    localizer: tuple[tuple[str, Any], ...] = ()
    level: str | None = None

    def flags(self) -> str:
        """As words of the command line."""
        words = [f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in self.refine if value is not False and value is not None]
        words += [f"--setting {name}={value}" for name, value in self.localizer]
        return " ".join([*words, *([f"--prompt-set …:{self.level}"] if self.level else [])]) or "(defaults)"


@dataclass(frozen=True)
class Judged:
    """A candidate with its figures: without labels `agreement` and `stability`, with labels `dice`; NaN where one is not defined."""

    candidate: Candidate
    score: float
    agreement: float
    stability: float
    dice: float
    area: float
    useless: float


@dataclass(frozen=True)
class Choice:
    """What `choose_settings` found.

    Attributes:
        judged: Candidates, best first.
        with_labels: Whether masks decided.
        images: Images that were looked at.
    """

    judged: tuple[Judged, ...]
    with_labels: bool
    images: int

    @property
    def best(self) -> Candidate:
        """The first candidate."""
        return self.judged[0].candidate

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        rows = [{"settings": {**dict(j.candidate.refine), **dict(j.candidate.localizer)} | ({"level": j.candidate.level} if j.candidate.level else {}),
                 **{name: _plain(getattr(j, name)) for name in ("score", "agreement", "stability", "dice", "area", "useless")}} for j in self.judged]
        return {"chosen_by": self.basis, "labels_used": self.with_labels, "images": self.images, "candidates": rows}

    @property
    def basis(self) -> str:
        """What decided."""
        return f"Dice with the masks of {self.images} images" if self.with_labels else f"agreement and stability on {self.images} images, without labels"

    def __str__(self) -> str:
        names = ("dice",) if self.with_labels else ("score", "agreement", "stability")
        lines = [f"chosen by {self.basis}", "  " + "".join(f"{name:>11}" for name in (*names, "area", "no use")) + "   settings"]
        for j in self.judged[:12]:
            lines.append("  " + "".join(_number(getattr(j, name)) for name in names) + f"{100 * j.area:9.1f} %{100 * j.useless:9.0f} %   {j.candidate.flags()}")
        if len(self.judged) > 12:
            lines.append(f"  … and {len(self.judged) - 12} more")
        if self.judged[0].score == -math.inf:
            lines.append("warning: every candidate leaves most regions empty or full; none is good.")
        lines.append("These images have now been used for a choice with labels: do not report results on them." if self.with_labels else
                     "No label was read. A high score is no proof of the right place: look at the regions, and at mwm localize check.")
        return "\n".join(lines)


def candidates_of(vary: Mapping[str, Sequence[Any]]) -> list[Candidate]:
    """All combinations of values: fields of `RefineSettings`, "level" for a prompt set's, everything else for the localizer.

    Combinations that differ only in a threshold that their method does not use count once.

    Raises:
        ValueError: a name has no values, a refine setting does not fit, or there are more than 500 combinations.
    """
    for name, values in vary.items():
        if not values:
            raise ValueError(f"choose: --vary {name} must have values, got none. For example --vary threshold=0.3,0.5.")
    if math.prod(len(values) for values in vary.values()) > 500:
        raise ValueError("choose: --vary must give at most 500 combinations, got more. Vary fewer settings at once.")
    found: dict[Candidate, None] = {}
    for values in itertools.product(*vary.values()):
        given = dict(zip(vary, values, strict=True))
        level = given.pop("level", None)
        kept = {name: given.pop(name) for name in list(given) if name in REFINE}
        if kept.get("method", "threshold") != "threshold":
            kept.pop("threshold", None)
        RefineSettings(**kept)
        found[Candidate(tuple(sorted(kept.items())), tuple(sorted(given.items())), level)] = None
    return list(found)


def choose_settings(
    make: Callable[[dict[str, Any]], Localizer],
    records: Sequence[Record],
    prompts: Callable[[str | None], Sequence[str]],
    candidates: Sequence[Candidate],
    *,
    masks: str | MaskFolder | None = None,
    read: ReadSettings | None = None,
    count: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Choice:
    """Judge candidates and put them in order.

    Args:
        make: From settings of the localizer to the localizer.
        records: Images, of which `count` evenly spaced ones are taken; with masks, of those that have one.
        prompts: From a level (or None) to sentences, of which the first five are used.
        candidates: What to judge.
        masks: None for a choice without labels; "masks" for those of the records, or a folder of masks.
        read: How images are read.
        count: Images to look at.
        seed: Of the noise on the copies.
        progress: Show a progress bar.

    Returns:
        Candidates with figures, best first; print it.

    Raises:
        ValueError: there are no candidates or too few usable images, or a setting does not fit.
    """
    if not candidates:
        raise ValueError("choose: candidates must be given, got none. Add --vary NAME=VALUE,VALUE.")
    read, folder = read or ReadSettings(), masks if isinstance(masks, MaskFolder) else None
    if masks is not None:
        records = [record for record in records if (folder.find(record) if folder else record.mask) is not None]
    least = 1 if masks is not None else 3
    if len(records) < least or count < least:
        raise ValueError(f"choose: images must be at least {least}{' with masks' if masks is not None else ''}, got {min(len(records), count)}.")
    chosen = [records[k] for k in sorted({round(k * (len(records) - 1) / max(1, count - 1)) for k in range(count)})]
    figures: dict[Candidate, _Figures] = {candidate: _Figures() for candidate in candidates}
    groups: dict[tuple[Any, ...], list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda c: repr(c.localizer)):  # levels of one localizer side by side
        groups.setdefault((candidate.localizer, candidate.level), []).append(candidate)
    made: dict[tuple[Any, ...], Localizer] = {}
    with tqdm(total=len(groups) * len(chosen), desc="choose", unit="image", leave=False, disable=None if progress else True) as bar:
        for (settings, level), alike in groups.items():
            if settings not in made:
                made = {settings: make(dict(settings))}  # one at a time in memory
            localizer = made[settings]
            texts = list(prompts(level))[:PARAPHRASES]
            for k, record in enumerate(chosen):
                image = read_image(record, read)
                path = (folder.find(record) if folder else record.mask) if masks is not None else None
                truth = None if path is None else match_size(read_record_mask(path, record, read), tuple(image.shape[1:]), "the mask")
                try:
                    maps = _maps(localizer, image, texts, seed + k, labels=truth is not None)
                except UnsupportedImage:
                    for candidate in alike:
                        figures[candidate].refuse(truth)
                    bar.update()
                    continue
                for candidate in alike:
                    figures[candidate].add(maps, image, RefineSettings(**dict(candidate.refine)), truth)
                bar.update()
    seen = max(f.accepted for f in figures.values())
    if seen < least:
        raise ValueError(f"choose: images must be at least {least} that the localizer accepts, got {seen}.")
    judged = sorted((f.judge(candidate, masks is not None) for candidate, f in figures.items()), key=lambda j: -j.score)
    return Choice(tuple(judged), masks is not None, seen)


def corrected(within: float, between: float) -> float:
    """(within - between) / (1 - between); 0 where regions of different images are all the same."""
    return (within - between) / (1 - between) if between < 1 else 0.0


def small_dice(a: Tensor, b: Tensor) -> float:
    """Dice of two regions; 1 where both are empty. bool, same shape"""
    total = int(a.sum()) + int(b.sum())
    return 1.0 if total == 0 else 2 * int((a & b).sum()) / total


def telling_dice(a: Tensor, b: Tensor) -> float | None:
    """Dice of two regions; None where both are empty or both are full, which is no agreement on a place. bool, same shape"""
    return None if not bool((a | b).any()) or bool((a & b).all()) else small_dice(a, b)


@dataclass(frozen=True)
class _Maps:
    """Maps of one image: of every sentence [P, H, W], their mean, and means under small changes."""

    each: Tensor
    mean: Tensor
    changed: tuple[Tensor, ...]


def _maps(localizer: Localizer, image: Tensor, texts: list[str], seed: int, *, labels: bool) -> _Maps:
    each = maps_of(localizer, image[None], texts)[0][:, 0].float().cpu()
    if labels:
        return _Maps(each, each.mean(0), ())
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    copy = (image.clamp(0, 1) ** 1.15 + 0.01 * noise).clamp(0, 1)
    changed = [maps_of(localizer, copy[None], texts)[0][:, 0].float().cpu().mean(0)]
    inner = getattr(localizer, "inner", localizer)
    if hasattr(inner, "seed"):
        before = inner.seed
        inner.seed = before + 1
        try:
            changed.append(maps_of(localizer, image[None], texts)[0][:, 0].float().cpu().mean(0))
        finally:
            inner.seed = before
    return _Maps(each, each.mean(0), tuple(changed))


class _Figures:
    """Regions and Dice of one candidate over the images."""

    def __init__(self) -> None:
        self.regions: list[Tensor] = []  # of the mean map, on one grid
        self.agree: list[float] = []
        self.stable: list[float] = []
        self.dice: list[float] = []
        self.accepted = 0

    def refuse(self, truth: Tensor | None) -> None:
        """An image that the localizer does not answer for: no region."""
        self.regions.append(torch.zeros(_GRID, _GRID, dtype=torch.bool))
        if truth is not None:
            self.dice.append(float(not bool((truth >= 0.5).any())))

    def add(self, maps: _Maps, image: Tensor, settings: RefineSettings, truth: Tensor | None) -> None:
        self.accepted += 1
        region = refine(maps.mean, settings, image) >= 0.5
        if truth is not None:
            self.dice.append(small_dice(region, truth >= 0.5))
        region = _on_grid(region)
        self.regions.append(region)
        if truth is not None:
            return
        parts = [_on_grid(refine(one, settings, image) >= 0.5) for one in maps.each]
        changed = [_on_grid(refine(one, settings, image) >= 0.5) for one in maps.changed]
        for kept, found in ((self.agree, _told(itertools.combinations(parts, 2))), (self.stable, _told((region, one) for one in changed))):
            if found:
                kept.append(sum(found) / len(found))

    def judge(self, candidate: Candidate, with_labels: bool) -> Judged:
        useless = _mean([float(not bool(r.any()) or bool(r.all())) for r in self.regions])
        area = _mean([float(r.float().mean()) for r in self.regions])
        if with_labels:
            dice = _mean(self.dice)
            return Judged(candidate, dice if dice == dice else -math.inf, math.nan, math.nan, dice, area, useless)
        somewhere = [r for r in self.regions if bool(r.any()) and not bool(r.all())]
        between = _mean([small_dice(a, b) for a, b in itertools.combinations(somewhere, 2)])
        agreement, stability = (corrected(_mean(values), between) if values else math.nan for values in (self.agree, self.stable))
        score = _mean([value for value in (agreement, stability) if value == value])
        return Judged(candidate, -math.inf if useless > _USELESS or score != score else score, agreement, stability, math.nan, area, useless)


def _told(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    return [found for a, b in pairs if (found := telling_dice(a, b)) is not None]


def _on_grid(region: Tensor) -> Tensor:
    mode = "area" if min(region.shape) > _GRID else "nearest-exact"
    return F.interpolate(region.float()[None, None], (_GRID, _GRID), mode=mode)[0, 0] >= 0.5


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float) -> str:
    return f"{value:11.3f}" if math.isfinite(value) else f"{'out' if value == -math.inf else '-':>11}"
