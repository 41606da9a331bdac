"""The arms of a study: what each changes in pre-training, where its regions come from, and what it may honestly be called."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mwm.data import ReadSettings
from mwm.localize import RefineSettings, create_localizer, list_localizers, localize_folder
from mwm.localize.training import training_of
from mwm.masking import create_policy, describe_policy
from mwm.study.crossfit import LABEL as SUPERVISED
from mwm.study.crossfit import FitSettings, crossfit_regions
from mwm.study.errors import StudyError
from mwm.study.shuffle import shuffle_regions
from mwm.study.typed import check_types
from mwm.train.masks import own_names

USES_LABELS, TEXT_GUIDED, UNGUIDED, NO_REGIONS = "uses labels", "text-guided", "no text, no masks", "no regions"
MAIN = "main"
"""Source of an arm: that of the study, whatever it is."""

_NO_TEXT = ("edges", "threshold")
_UNIFORM, _REGION = re.compile(r"uniform(\d\d)"), re.compile(r"region(\d\d)_(\d\d)")


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        name: As in folders and tables.
        says: What it is, in one line.
        source: Where regions come from: MAIN, "roi" (the masks themselves), the name of a localizer, or None.
        shuffled: Whether each image gets the region of another.
        foreground: Whether a second map, of what is not air, is needed.
        pretrain: Whether there is a pre-training.
        init: What fine-tuning starts from: "pretrained", "scratch", or "imagenet" (a local file).
        longer: Whether fine-tuning takes as many epochs as pre-training and fine-tuning of the other arms together.
        settings: Fields of `PretrainConfig` that the arm sets.
        counts_only: Whether only the number of region patches per image reaches the masks, not their places.
        time_of: Two arms (A, B): pre-training takes as long as that of A instead of as many epochs, by the step time of B, whose masks are those of this arm.
    """

    name: str
    says: str
    source: str | None = MAIN
    shuffled: bool = False
    foreground: bool = False
    pretrain: bool = True
    init: str = "pretrained"
    longer: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    counts_only: bool = False
    time_of: tuple[str, str] | None = None

    def facts(self) -> dict[str, Any]:
        """Everything that the arm is, for a hash. A field that came later is left out where it is not set, so that results of before keep their hash."""
        plain = asdict(self)
        return {name: value for name, value in plain.items() if name != "time_of" or value is not None}

    def label(self, source: Source) -> str:
        """What tables call the arm's regions; says so wherever masks of the data set are behind them."""
        kind = self.kind(source)
        if kind == NO_REGIONS:
            return kind
        if self.shuffled:
            return f"regions of other images ({kind})"
        if self.foreground:
            return f"foreground by {source.foreground[0]}; number hidden: {kind}" if self.counts_only else f"{kind}; foreground by {source.foreground[0]}"
        return f"number hidden only: {kind}" if self.counts_only else kind

    def kind(self, source: Source) -> str:
        """Where the regions come from, in the words of the tables."""
        if self.source is None:
            return NO_REGIONS
        if self.source == "roi":
            return USES_LABELS
        return source.kind if self.source == MAIN else UNGUIDED

    def uses_labels(self, source: Source) -> bool:
        """Whether the masks of the evaluated data set are its regions."""
        return self.kind(source) == USES_LABELS

    def supervised(self, source: Source) -> bool:
        """Whether masks of the data set's training patients are behind its regions, or behind the number of patches it hides."""
        return self.kind(source) in (USES_LABELS, SUPERVISED)


@dataclass(frozen=True)
class Source:
    """Where the regions of a data set come from.

    Attributes:
        name: "crossfit" (localizers trained on the fold's masks), "masks" (the masks themselves), or the name of a localizer.
        prompt: What is looked for.
        checkpoint: Weights of the localizer, where it has several.
        settings: Further arguments of the localizer, for example {setting: fast, layer: 7} of bottleneck.
        parts: K of "crossfit".
        steps: Optimizer steps of each localizer of "crossfit"; None for the default.
        refine: Fields of `RefineSettings`.
        foreground: Localizer and prompt of what is not air, for the arm `foreground`.

    Raises:
        StudyError: the name is unknown, or "tiny", whose shipped weights have seen images that a study evaluates on.
    """

    name: str = "crossfit"
    prompt: str | None = None
    checkpoint: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    parts: int = 3
    steps: int | None = None
    refine: Mapping[str, Any] = field(default_factory=dict)
    foreground: tuple[str, str] = ("threshold", "body")

    def __post_init__(self) -> None:
        check_types(vars(self), Source, "source")
        if self.name == "tiny":
            raise StudyError("study: the source of regions must not be tiny, whose shipped weights have learnt from masks of patients that the study evaluates on. "
                             "Take crossfit: the same network, trained anew in every fold, each image mapped by a localizer that never saw its patient.")
        known = ["crossfit", "masks", *(name for name in list_localizers() if name not in ("tiny", "maps"))]
        if self.name not in known:
            raise StudyError(f"study: the source of regions must be one of {', '.join(known)}, got {self.name!r}, a localizer that this version of mwm does not have. "
                             "Nothing is put in its place; the study cannot run until it is there.")
        if self.name not in ("masks", "edges") and not self.prompt:
            raise StudyError(f"study: the source {self.name} must have a prompt, got none. Add prompt: TEXT to the data set.")
        for field_, least, value in (("parts", 2, self.parts), ("steps", 1, 1 if self.steps is None else self.steps)):
            if value < least:
                raise StudyError(f"study: {field_} of a source must be a whole number of at least {least}, got {value!r}.")
        taken = sorted({"checkpoint", "device"} & set(self.settings))
        if taken:  # a checkpoint that learnt from masks would not be seen there, and its regions called text-guided
            raise StudyError(f"study: settings of a source must be without checkpoint and device, got {', '.join(taken)}. The checkpoint is a field of the source; the device is "
                             "that of the study.")
        try:
            RefineSettings(**self.refine)
        except (TypeError, ValueError) as error:
            raise StudyError(f"study: refine of a source must hold fields of RefineSettings, got {dict(self.refine)!r} ({error}).") from error
        known = [name for name in known if name not in ("crossfit", "masks")]
        if self.foreground[0] not in known:
            raise StudyError(f"study: foreground of a source must be [localizer, prompt] with one of {', '.join(known)}, got {list(self.foreground)!r}.")

    @property
    def kind(self) -> str:
        """What an arm with these regions may be called; a checkpoint that `mwm localize train` taught with masks is a supervised source, whatever text it is asked with."""
        if self.name in ("crossfit", "masks"):
            return SUPERVISED if self.name == "crossfit" else USES_LABELS
        if self.name in _NO_TEXT:
            return UNGUIDED
        learnt = training_of(self.checkpoint) if self.checkpoint else None
        return SUPERVISED if learnt is not None and learnt.supervised else TEXT_GUIDED


def _region(high: float, low: float) -> dict[str, Any]:
    return {"mask": "region", "high": high, "low": low}


_ARMS = (
    Arm("uniform", "uniform with, image by image and epoch by epoch, the same number of visible patches as region", counts_only=True,
        settings={"mask": "matched", "high": 0.8, "low": 0.4}),
    Arm("region", "region 0.8 inside, 0.4 outside", settings=_region(0.8, 0.4)),
    Arm("shuffled", "as region, with the region of another image of the same class and split", shuffled=True, settings=_region(0.8, 0.4)),
    Arm("scratch", "no pre-training", source=None, pretrain=False, init="scratch"),
    Arm("scratch_long", "no pre-training, fine-tuned as long as pre-training and fine-tuning together", source=None, pretrain=False, init="scratch", longer=True),
    Arm("roi", "as region, with the masks of the data set: an upper bound", source="roi", settings=_region(0.8, 0.4)),
    Arm("foreground", "uniform over patches that are not air, the same number hidden as by region", foreground=True, counts_only=True,
        settings={"mask": "foreground", "high": 0.8, "low": 0.4}),
    Arm("weighted", "masks of uniform, the loss of hidden patches inside the region counted twice", settings={"mask": "matched", "high": 0.8, "low": 0.4, "region_weight": 2.0}),
    Arm("edges", "as region, with the places of strong edges as region", source="edges", settings=_region(0.8, 0.4)),
    Arm("uniform60", "uniform, 60 % hidden (SparK)", source=None, settings={"mask": "uniform", "mask_ratio": 0.6}),
    Arm("uniform70", "uniform, 70 % hidden", source=None, settings={"mask": "uniform", "mask_ratio": 0.7}),
    Arm("region70_30", "region 0.7 inside, 0.3 outside", settings=_region(0.7, 0.3)),
    Arm("region60_20", "region 0.6 inside, 0.2 outside", settings=_region(0.6, 0.2)),
    Arm("imagenet", "ImageNet weights of a local file, no pre-training", source=None, pretrain=False, init="imagenet"),
    Arm("uniform60_time", "uniform, 60 % hidden, as many epochs as fit the pre-training time of region", source=None, settings={"mask": "uniform", "mask_ratio": 0.6},
        time_of=("region", "uniform60")),
)
ARMS: dict[str, Arm] = {arm.name: arm for arm in _ARMS}
"""The arms in their order of value."""


def arm(name: str) -> Arm:
    """An arm by name: one of `ARMS`, `uniformNN` (NN % hidden), `regionHH_LL` (HH % inside, LL % outside), or a masking policy of one's own, with its defaults.

    Raises:
        StudyError: there is no such arm.
    """
    if not isinstance(name, str):
        raise StudyError(f"study: arms must be named by texts, got {name!r}.")
    if name in ARMS:
        return ARMS[name]
    if (found := _UNIFORM.fullmatch(name)) and int(found[1]):
        return Arm(name, f"uniform, {found[1]} % hidden", source=None, settings={"mask": "uniform", "mask_ratio": int(found[1]) / 100})
    if (found := _REGION.fullmatch(name)) and int(found[1]) >= max(1, int(found[2])):
        high, low = int(found[1]) / 100, int(found[2]) / 100
        return Arm(name, f"region {high} inside, {low} outside", settings=_region(high, low))
    if name in own_names():
        policy = create_policy(name)
        return Arm(name, f"masks of {name} ({describe_policy(name)})", source=MAIN if policy.needs_region else None, foreground=policy.needs_foreground, settings={"mask": name})
    near = difflib.get_close_matches(str(name), ARMS, 1, 0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise StudyError(f"study: arms must be among {', '.join([*ARMS, *own_names()])}, uniformNN and regionHH_LL (per cent, above 0, high at least low), got {name!r}.{hint}")


def region_fields(arm: Arm, source: Source, fold: str | Path, folder: str | Path, *, seed: int, device: Any = None, read: ReadSettings | None = None,
                  progress: bool = False) -> dict[str, Any]:
    """Make the regions of an arm where they are missing, and say what `PretrainConfig` needs.

    Arms share regions: those of one source lie in one folder per data set and fold. Test images are not read, and of masks only those of training rows.

    Args:
        arm: The arm.
        source: Of the data set.
        fold: CSV of the fold (`write_folds`), with its pre-training CSV beside it.
        folder: Where the regions of this data set and fold are kept.
        seed: Of cross-fitting and shuffling.
        device: Where localizers run; None or "auto" for the first CUDA device where there is one, else the CPU.
        read: How images are read; `size` and `aspect` do not matter.
        progress: Show progress bars.

    Returns:
        The arm's settings with `regions` and, where needed, `foreground`.
    """
    fold, folder = Path(fold), Path(folder)
    fields = dict(arm.settings)
    if not arm.pretrain or arm.source is None:
        return fields
    name = {MAIN: source.name, "roi": "masks"}.get(arm.source, arm.source)
    options = {"seed": seed, "device": None if device == "auto" else device, "read": read, "progress": progress}
    regions = _made(name, source, fold, folder, options)
    if arm.shuffled:
        shuffled = folder / f"shuffled-{name}"
        shuffle_regions(fold, regions, shuffled, seed=seed, read=read, splits=("train", "unlabelled"))
        regions = str(shuffled)
    fields["regions"] = regions
    if arm.foreground:
        localizer, prompt = source.foreground
        fields["foreground"] = str(_localized(localizer, prompt, {}, {}, fold, folder / "foreground", options))
    return fields


def _made(name: str, source: Source, fold: Path, folder: Path, options: Mapping[str, Any]) -> str:
    """What `--regions` takes."""
    if name == "masks":
        return "masks"
    if name != "crossfit":
        refine = source.refine if name == source.name else {}
        own = {"checkpoint": source.checkpoint, **source.settings} if name == source.name else {}
        return str(_localized(name, source.prompt, own, refine, fold, folder / name, options))
    settings = None if source.steps is None else FitSettings(steps=source.steps)
    crossfit_regions(fold, folder / name, str(source.prompt), parts=source.parts, seed=options["seed"], device=options["device"], settings=settings,
                     refinement=RefineSettings(**source.refine), read=options["read"], others=("unlabelled",))
    return str(folder / name)


def _localized(localizer: str, prompt: str | None, own: Mapping[str, Any], refine: Mapping[str, Any], fold: Path, out: Path, options: Mapping[str, Any]) -> Path:
    """Regions by a localizer without training; found regions are kept."""
    model = create_localizer(localizer, **{"device": options["device"], **own})
    localize_folder(fold.with_suffix(".pretrain.csv"), prompt, model, out, RefineSettings(**refine) if refine else None, read=options["read"],
                    progress=options["progress"])
    return out
