"""Does the map follow the text? CLIP-like models are known to give one map for "brain tumor" and for "sitting on a chair"; this finds it out without labels.

The map of the prompt is compared with those of three other texts: a neutral one ("a medical image"), one that names what is absent ("sitting on a chair"), and
random letters; with that of the same prompt in other words, which is to change less than those do, since an untrained network's map, too, changes with every
text; with a Gaussian in the image's middle, which a map may follow instead of text and image; and, where the localizer draws noise, with its own map
under another seed, which says how much two maps differ for no reason at all.

Two figures, each a mean over the images: the correlation over pixels, and the mass shift sum |a - b| / sum (a + b), which is 0 for equal maps and 1 where one is
empty or both lie apart. A map that is merely fainter for the absent thing has the same correlation but another mass. `CheckLimits` says what they must be, and why.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mwm.data import DataError, ReadSettings, Record, read_image
from mwm.localize.check_limits import CheckLimits
from mwm.localize.ensemble import EnsembleLocalizer, maps_of
from mwm.localize.map_figures import centre_prior, correlation, mass_shift
from mwm.localize.protocol import Localizer, PromptRefused, UnsupportedImage
from mwm.localize.training import source_line

NEUTRAL, ABSENT = "a medical image", "sitting on a chair"
REWORDED = "{} can be seen here"
IMAGES, SHOWN = 16, 12
_OBEDIENT = frozenset({"tiny", "maps", "edges", "threshold"})  # refuse what they do not know, or read no text at all and say so


@dataclass(frozen=True)
class Contrast:
    """The prompt's map against another one.

    Attributes:
        kind: neutral, absent, random, reworded, seed or centre.
        text: What was asked instead.
        correlation: Mean over images; NaN where a map of every pair is constant.
        shift: Mean mass shift; NaN for the centre, which has no mass of its own.
        refused: Share of images for which the localizer refused the text, which counts as following it.
    """

    kind: str
    text: str
    correlation: float
    shift: float
    refused: float


@dataclass(frozen=True)
class Shown:
    """Maps of one image, for pictures: float32 [C, H, W] and [H, W]; None where the text was refused."""

    image: Tensor
    prompt: Tensor
    others: dict[str, Tensor | None]


@dataclass(frozen=True)
class CheckReport:
    """What `check_localizer` found.

    Attributes:
        verdict: "pass", "weak" or "fail".
        reasons: Why it is no pass, a sentence each.
        contrasts: All comparisons.
        images: Images that were looked at.
        localizer: Name of the localizer.
        prompt: The prompt, or the first of several.
        similarity: Mean cosine of image and prompt, where the localizer tells it.
        shown: A few images with their maps.
        silent: Share of images on which the prompt's map shows nothing.
        limits: What the figures were held against.
        source: What the localizer learnt from, as `Training.source`; empty where nothing but its text is known to be behind it.
    """

    verdict: str
    reasons: tuple[str, ...]
    contrasts: tuple[Contrast, ...]
    images: int
    localizer: str
    prompt: str
    similarity: float | None
    shown: tuple[Shown, ...]
    silent: float = 0.0
    limits: CheckLimits = field(default_factory=CheckLimits)
    source: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values."""
        rows = [{"against": c.kind, "text": c.text, "correlation": _plain(c.correlation), "mass_shift": _plain(c.shift), "refused": c.refused} for c in self.contrasts]
        return {"verdict": self.verdict, "reasons": list(self.reasons), "localizer": self.localizer, "prompt": self.prompt, "images": self.images,
                "similarity": self.similarity, "contrasts": rows, "silent": self.silent, "limits": self.limits.to_dict()} | ({"source": self.source} if self.source else {})

    def __str__(self) -> str:
        lines = [f'check: does the map of "{self.prompt[:70]}" follow the text? {self.images} images, localizer {self.localizer}',
                 f"  {'against':40} {'correlation':>11} {'mass shift':>10}   passes with"]
        for c in self.contrasts:
            named = f'{c.kind} "{c.text if len(c.text) <= 28 else c.text[:27] + "…"}"' if c.text else {"centre": "the middle of the image", "seed": "itself, another seed"}[c.kind]
            told = f"{'refused':>11} {'':10}" if c.refused == 1 else f"{_number(c.correlation)} {_number(c.shift, 10)}"
            lines.append(f"  {named:40} {told}   {self.limits.needed(c.kind)}" + (f"   (refused for {100 * c.refused:.0f} % of the images)" if 0 < c.refused < 1 else ""))
        lines.append(f"  {'maps of the prompt that show nothing':40} {f'{100 * self.silent:.0f} %':>11} {'':10}   less than {100 * self.limits.silent:g} %")
        lines.append(f"  fails where the absent or the random text gives the same map: {self.limits.failing()}")
        lines += [line for line in (source_line(self.source),) if line]
        return "\n".join([*lines, f"verdict: {self.verdict}" + (" - " + "; ".join(self.reasons) if self.reasons else "")])


def may_ignore_text(localizer: Localizer) -> bool:
    """Whether a localizer answers any text, and so may answer every text alike; `mwm localize` checks these first."""
    return localizer.name not in _OBEDIENT and not hasattr(localizer, "prompt_for")


def check_localizer(
    localizer: Localizer,
    records: Sequence[Record],
    prompt: str | None = None,
    *,
    read: ReadSettings | None = None,
    neutral: str = NEUTRAL,
    absent: str | None = None,
    count: int = IMAGES,
    seed: int = 0,
    limits: CheckLimits | None = None,
    progress: bool = True,
) -> CheckReport:
    """Compare the prompt's maps with those of other texts on a few images.

    Args:
        localizer: Any localizer, also an `EnsembleLocalizer`, whose negative prompts are then subtracted from all maps.
        records: Images, of which `count` evenly spaced ones are taken.
        prompt: Text for every image; a record's own goes before it.
        read: How images are read.
        neutral: A text that fits every image.
        absent: A text that fits none; "sitting on a chair" where left out.
        count: Images to look at.
        seed: Of the random letters.
        limits: From figures to the verdict.
        progress: Show a progress bar.

    Returns:
        Figures and verdict; print it.

    Raises:
        ValueError: there is no prompt or no usable image, or the localizer refuses the prompt itself.
    """
    if count < 2:
        raise ValueError(f"check: images must be at least 2, got {count}.")
    if hasattr(localizer, "prompt_for"):
        raise ValueError(f"check: localizer must read prompts, got {localizer.name}, which does not.")
    limits, read = limits or CheckLimits(), read or ReadSettings()
    texts = {"neutral": neutral, "absent": absent or ABSENT, "random": random_letters(seed)}
    chosen = [records[k] for k in sorted({round(k * (len(records) - 1) / max(1, count - 1)) for k in range(count)})] if records else []
    run = _Run(localizer, texts)
    for record in tqdm(chosen, desc="check", unit="image", leave=False, disable=None if progress else True):
        text = record.prompt or prompt
        if not text and not getattr(localizer, "prompts", ()):
            raise ValueError("check: prompt must be given, got none. Add --prompt TEXT.")
        try:
            run.look(read_image(record, read)[None], text or localizer.prompts[0])
        except (DataError, OSError, UnsupportedImage) as error:
            run.lost = str(error)
    if not run.shown:
        raise ValueError(f"check: images must hold a usable one, got none: {run.lost or 'the list is empty.'}")
    contrasts = run.contrasts()
    silent = sum(float(one.prompt.max()) < limits.peak for one in run.shown) / len(run.shown)
    verdict, reasons = judge(contrasts, silent, limits)
    training = getattr(localizer, "training", None)
    told = (getattr(localizer, "prompts", None) or (prompt or chosen[0].prompt,))[0]
    similarity = sum(run.similarity) / len(run.similarity) if run.similarity else None
    return CheckReport(verdict, reasons, contrasts, len(run.shown), localizer.name, told, similarity, tuple(run.shown[:SHOWN]), silent, limits,
                       training.source() if training else {})


def judge(contrasts: Sequence[Contrast], silent: float, limits: CheckLimits | None = None) -> tuple[str, tuple[str, ...]]:
    """Verdict and reasons.

    Args:
        contrasts: The comparisons.
        silent: Share of images whose map of the prompt shows nothing.
        limits: What figures must be.
    """
    limits = limits or CheckLimits()
    found = {c.kind: c for c in contrasts}
    bad, poor = [], []
    if silent >= limits.silent:
        bad.append(f"the maps of the prompt show nothing on {100 * silent:.0f} % of the images")
    seeds, reworded = found.get("seed"), found.get("reworded")
    reworded = None if reworded is None or reworded.refused >= 0.5 else reworded
    for kind in ("absent", "random", "neutral"):
        c = found.get(kind)
        if c is None or c.refused >= 0.5:
            continue
        same = c.shift < limits.shift or (not c.correlation < limits.same and c.shift < limits.apart)
        lost = seeds is not None and c.shift < limits.apart and c.correlation > seeds.correlation - limits.margin
        vague = kind != "neutral" and reworded is not None and c.shift < reworded.shift + limits.margin
        differs = c.shift >= limits.apart or (c.shift >= limits.moved and c.correlation <= limits.differs)
        if same or lost:
            why = "is the same" if same else "differs no more than two seeds do"
            (poor if kind == "neutral" else bad).append(f'the map of "{c.text}" {why}')
        elif vague:
            bad.append(f'the map of "{c.text}" differs no more than that of the prompt in other words')
        elif not differs and kind != "neutral":
            poor.append(f'the map of "{c.text}" is much alike')
    if reworded is not None and reworded.shift >= limits.moved and not reworded.correlation >= limits.steady:
        poor.append("the prompt in other words gives another map")
    if seeds is not None and not seeds.correlation >= limits.noise:
        poor.append("two seeds give different maps")
    if "centre" in found and found["centre"].correlation >= limits.centre:
        poor.append("the map is hardly more than the middle of the image")
    return ("fail" if bad else "weak" if poor else "pass"), tuple(bad + poor)


def random_letters(seed: int) -> str:
    """Three words of random letters."""
    draw = random.Random(f"letters {seed}")
    return " ".join("".join(draw.choice("bcdfghjklmnpqrstvwxz") for _ in range(4)) for _ in range(3))


class _Run:
    """Maps and figures of the images that were looked at."""

    def __init__(self, localizer: Localizer, texts: dict[str, str]) -> None:
        self.localizer, self.others, self.texts, self.lost = localizer, texts, dict(texts), ""
        self.inner = getattr(localizer, "inner", localizer)
        self.shown: list[Shown] = []
        self.similarity: list[float] = []
        self.figures: dict[str, list[tuple[float, float]]] = {}
        self.refused: dict[str, int] = {}

    def look(self, image: Tensor, prompt: str) -> None:
        """Ask all texts about one image. [1, C, H, W]"""
        own = self._ask(image, prompt, self.localizer)
        told = getattr(self.localizer, "similarity", None)
        if told is not None:
            self.similarity.append(float(told.reshape(-1)[0]))
        self._compare("centre", own, centre_prior(*own.shape), shift=False)
        others: dict[str, Tensor | None] = {}
        for kind, text in self.others.items():
            try:
                others[kind] = self._ask(image, text, self._instead(text))
                self._compare(kind, own, others[kind])
            except (PromptRefused, UnsupportedImage):
                others[kind], self.refused[kind] = None, self.refused.get(kind, 0) + 1
        self._reword(image, prompt, own)
        if hasattr(self.inner, "seed"):
            before = self.inner.seed
            self.inner.seed = before + 1
            try:
                self._compare("seed", own, self._ask(image, prompt, self.localizer))
            finally:
                self.inner.seed = before
        self.shown.append(Shown(image[0], own, others))

    def _reword(self, image: Tensor, prompt: str, own: Tensor) -> None:
        """Ask the prompt in other words, where the localizer can read them."""
        prompts = getattr(self.localizer, "prompts", ()) or (prompt,)
        texts = [REWORDED.format(text) for text in prompts]
        self.texts.setdefault("reworded", texts[0])
        asked = self.inner
        if self.localizer is not self.inner:
            asked = EnsembleLocalizer(self.inner, texts, getattr(self.localizer, "negatives", ()), self.localizer.weight)
        try:
            self._compare("reworded", own, self._ask(image, texts[0], asked))
        except (PromptRefused, UnsupportedImage):
            self.refused["reworded"] = self.refused.get("reworded", 0) + 1
        except ValueError:  # too long for the text tower
            return

    def _instead(self, text: str) -> Localizer:
        """The localizer that asks another text: of an ensemble, with the same negative prompts."""
        negatives = getattr(self.localizer, "negatives", ())
        return EnsembleLocalizer(self.inner, [text], negatives, self.localizer.weight) if negatives else self.inner

    def _ask(self, image: Tensor, text: str, localizer: Localizer) -> Tensor:
        heat = maps_of(localizer, image, [text])[0][0, 0].float().cpu()
        if not bool(torch.isfinite(heat).all()):
            raise ValueError(f"check: maps must be finite, got NaN or infinity from {localizer.name}. Try float32 or another localizer.")
        return heat

    def _compare(self, kind: str, a: Tensor, b: Tensor, *, shift: bool = True) -> None:
        self.figures.setdefault(kind, []).append((correlation(a, b), mass_shift(a, b) if shift else math.nan))

    def contrasts(self) -> tuple[Contrast, ...]:
        """Means over the images."""
        found = []
        for kind in (*self.others, "reworded", "seed", "centre"):
            pairs, refused = self.figures.get(kind, []), self.refused.get(kind, 0)
            if pairs or refused:
                means = [_mean([pair[k] for pair in pairs]) for k in (0, 1)]
                found.append(Contrast(kind, self.texts.get(kind, ""), *means, refused / len(self.shown)))
        return tuple(found)


def _mean(values: list[float]) -> float:
    kept = [value for value in values if value == value]
    return sum(kept) / len(kept) if kept else math.nan


def _plain(value: float) -> float | None:
    return None if value != value else value


def _number(value: float, width: int = 11) -> str:
    return f"{value:{width}.2f}" if value == value else f"{'-':>{width}}"
