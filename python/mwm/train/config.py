"""What a pre-training run is told: one frozen dataclass, from Python, from flags or from a YAML file."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OPTIMIZERS = ("lamb", "adamw")
PRECISIONS = ("fp32", "bf16", "fp16")
MAX_CHANNELS = 64  # what an encoder's file is trusted to claim
_MOST_VALUES = 5_000_000  # of a YAML file, the ids of skipped images counted
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
#: Fields that may differ between a run and its continuation: they change speed, looks or place, not a number.
FREE_ON_RESUME = frozenset({"out", "overwrite", "resume", "workers", "cache", "device", "cuda_graph", "threads", "panel_every", "panel_images", "log_every",
                            "checkpoint_minutes", "checkpoint_steps", "strict", "progress", "images", "regions", "foreground", "localizer_checkpoint", "localizer_revision"})


class TrainError(ValueError):
    """A run that cannot start or go on; the message says what to do."""


def _help(default: Any, text: str | Callable[[], str]) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of a pre-training run, checked on creation.

    The defaults are the paper's (arXiv 2509.23054) except batch and epochs, which fit one workstation.

    Raises:
        TrainError: a value is out of its range; the message names the field.
    """

    images: str = _help("", "folder, glob, text list or index CSV of the images")
    out: str = _help("", "folder of the run; must not exist, unless overwrite or resume")
    encoder: str = _help("resnet50", 'a timm name, or "torchvision/NAME"')
    regions: str | None = _help(None, "folder of regions (made by `mwm localize`) or of masks with the images' names; or masks: the column mask of the index CSV")
    foreground: str | None = _help(None, "folder of the maps of what is not air, for --mask foreground: mwm localize --localizer threshold --prompt body")
    prompt: str | None = _help(None, "what to mask more, in words; localized before training")
    localizer: str = _help("tiny", "name of the localizer that reads the prompt")
    localizer_checkpoint: str | None = _help(None, "folder or hub name of the localizer's weights")
    localizer_revision: str | None = _help(None, "commit, branch or tag of that hub name; default: a preset's own, else the newest")
    split: str | None = _help(None, "take only rows of this split of an index CSV")
    overwrite: bool = _help(False, "replace an existing run")
    resume: bool = _help(False, "continue the run in `out` from its checkpoint, bit for bit")

    image_size: int | tuple[int, int] = _help(224, "edge of the square image, or (height, width); pixels")
    channels: int | None = _help(None, "channels of the images; default: those of the files")
    intensity: str = _help("auto", "auto | percentile | window=C,W | minmax")
    read: dict[str, Any] = field(default=None, metadata={"help": "further settings of mwm.data.ReadSettings"})
    crop_scale: tuple[float, float] = _help((1.0, 1.0), "area of the random crop, as shares of the image; 1 1 = none")
    flip: bool = _help(True, "flip half of the images left to right")
    cache: str | None = _help(None, "keep decoded images in ram | disk | device (small data sets: no loader between them and the GPU)")
    strict: bool = _help(False, "stop at an unreadable file instead of skipping it")

    mask: str = _help("auto", lambda: _masks().mask_help())
    mask_settings: dict[str, Any] = field(default=None, metadata={"help": "further settings of a policy of one's own, by name"})
    mask_ratio: float | None = _help(None, "share of patches that is hidden: uniform (default 0.6), or overall for region")
    high: float | None = _help(None, "share hidden inside the region (default 0.8)")
    low: float | None = _help(None, "share hidden outside the region (default 0.4)")
    min_cover: float = _help(0.25, "covered share from which a patch counts as region")
    empty: str = _help("mean", "images with an empty region: mean (hide the others' mean share) | low | error")

    region_weight: float = _help(1.0, "how much a hidden patch inside the region counts in the loss, relative to the others; the mean weight is 1")

    patch_size: int = _help(32, "edge of the patch that is hidden as a unit, pixels")
    decoder_width: int = _help(768, "channels of the decoder at the deepest stride")
    decode: str = _help("dense", "dense (the paper) | hidden: decode hidden patches only; faster, another function of the same weights")
    densify_norm: str = _help("auto", "norm before the mask token: batch | layer | auto")
    min_std: float = _help(0.0, "leave patches of a smaller standard deviation (in units of that of all images) out of the loss; 0.05 drops air")
    drop_path: float = _help(0.0, "stochastic depth rate of the encoder")

    optimizer: str = _help("lamb", "lamb | adamw")
    epochs: int = _help(300, "passes over the images")
    batch_size: int = _help(64, "images per step, over all processes")
    base_lr: float = _help(2e-4, "learning rate per 256 images of batch")
    min_lr: float = _help(0.0, "learning rate at the end of the cosine, per 256 images of batch")
    weight_decay: float = _help(0.04, "weight decay at the start")
    weight_decay_end: float = _help(0.2, "weight decay at the end of its cosine")
    warmup_epochs: float | None = _help(None, "epochs of linear warm-up; default 8 % of epochs")
    beta2: float | None = _help(None, "second beta of the optimizer; default 0.95 with batch norm, else 0.999")
    clip: float | None = _help(5.0, "largest gradient norm")
    precision: str = _help("fp32", "fp32 | bf16 | fp16 (fp16 on CUDA)")

    seed: int = _help(0, "seed of weights, order, crops, flips, masks and drop path")
    device: str = _help("auto", "auto | cpu | cuda | cuda:N")
    threads: int | None = _help(None, "CPU threads of torch")
    cuda_graph: bool = _help(False, "replay steps as CUDA graphs, so that the host does not slow a fast GPU; one process, no drop path")
    workers: int | None = _help(None, "loader processes; default: one per spare CPU, at most 4")
    log_every: int = _help(10, "steps between writes of metrics.csv and TensorBoard (every step is logged)")
    checkpoint_minutes: float = _help(10.0, "minutes between checkpoints; 0 = none by time")
    checkpoint_steps: int = _help(0, "steps between checkpoints; 0 = none by steps")
    panel_every: int = _help(10, "epochs between reconstruction panels, and one at the end; 0 = none")
    panel_images: int = _help(8, "images on a panel")
    progress: bool = _help(True, "show the progress bar")

    def __post_init__(self) -> None:
        for name in ("images", "out", "regions", "foreground"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        for name, example in (("read", "{aspect: crop}"), ("mask_settings", "{rows: 2}")):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise TrainError(f"pretrain: {name} must be a mapping of settings such as {example}, got {value!r}.")
            object.__setattr__(self, name, dict(value or {}))
        for name in ("image_size", "crop_scale"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _check(self)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return self.size[0] // self.patch_size, self.size[1] // self.patch_size

    @property
    def masks_regions(self) -> bool:
        """Whether the policy looks at regions."""
        return _masks().reads(self)[0]

    @property
    def reads_regions(self) -> bool:
        """Whether regions are read, by the policy or for the loss."""
        return self.masks_regions or self.region_weight != 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to config.yaml; `mask_settings` only where there are some, so that files of before stay the same."""
        plain = {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in dataclasses.fields(self)}
        return {name: value for name, value in plain.items() if name != "mask_settings" or value}

    def replace(self, **changes: Any) -> PretrainConfig:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **_known(changes))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PretrainConfig:
        """From plain values; unknown names are refused with the nearest known one."""
        return cls(**_known(values))

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> PretrainConfig:
        """From a YAML file of field names; `overrides` win.

        Raises:
            TrainError: the file is missing, no mapping, or names an unknown field.
        """
        return cls.from_dict({**read_yaml(path), **overrides})

    @classmethod
    def from_run(cls, run: str | Path, **overrides: Any) -> PretrainConfig:
        """The configuration of an existing run, set to continue it."""
        path = Path(run) / "config.yaml"
        if not path.is_file():
            raise TrainError(f"pretrain: {Path(run).name} must be a run with a config.yaml, which is not there. Give the folder a run wrote.")
        return cls.from_yaml(path, **{"out": str(run), "resume": True, "overwrite": False, **overrides})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping, its section `resolved` (what a run found out itself) left out."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise TrainError(f"config: the file must be readable, got {error.strerror}: {path}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise TrainError(f"config: {path} must be a YAML text, got bytes that are no text. Check the path.") from error
    except yaml.YAMLError as error:
        raise TrainError(f"config: {path} must be YAML, got {str(error).splitlines()[0]}. Write `name: value` lines.") from error
    except RecursionError as error:
        raise TrainError(f"config: {path} must be YAML of a few levels, got lists or mappings that are nested too deeply. Write `name: value` lines.") from error
    if not _is_small(values):
        raise TrainError(f"config: {path} must be YAML of at most {_MOST_VALUES:,} values, got more (aliases counted where they stand). Write `name: value` lines.")
    if not isinstance(values, dict):
        raise TrainError(f"config: {path} must hold `name: value` lines, got {type(values).__name__}.")
    values.pop("resolved", None)
    return {name: as_number(value) for name, value in values.items()}


def _is_small(values: Any) -> bool:
    """Whether a value holds few others: a few lines of YAML aliases can stand for billions, which show as soon as a sentence quotes one."""
    left, count = [values], 0
    while left:
        value = left.pop()
        count += 1
        if count > _MOST_VALUES:
            return False
        if isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, (list, tuple)):
            left.extend(value)
    return True


def as_number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 (without a point) as text; everybody means the number."""
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return value


def _known(values: dict[str, Any]) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(PretrainConfig)]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1, 0.4)
            hint = f" Did you mean {near[0]!r}?" if near else f" The settings are {', '.join(names)}."
            raise TrainError(f"config: {name!r} is no setting of mwm pretrain.{hint}")
    return values


def _masks() -> Any:
    """`mwm.train.masks`, which needs torch, while this module by itself does not."""
    from mwm.train import masks

    return masks


def _check(config: PretrainConfig) -> None:
    def need(holds: Any, name: str, rule: str, fix: str = "") -> None:
        if not holds:
            raise TrainError(f"pretrain: {name} must be {rule}, got {getattr(config, name)!r}.{' ' + fix if fix else ''}")

    def whole(value: Any, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    def real(value: Any, low: float, high: float = math.inf, *, open_end: bool = False) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and low <= value and (value < high if open_end else value <= high)

    need(config.images, "images", "a folder, glob, text list or index CSV")
    need(config.out, "out", "the folder of the run")
    for name in ("images", "out", "encoder", "intensity", "device"):
        need(isinstance(getattr(config, name), str), name, "a text", "Put it in quotes.")
    for name in ("regions", "foreground", "prompt", "localizer", "localizer_checkpoint", "localizer_revision", "split"):
        need(getattr(config, name) is None or isinstance(getattr(config, name), str), name, "a text", "Put it in quotes.")
    for name in ("overwrite", "resume", "flip", "strict", "progress"):
        need(isinstance(getattr(config, name), bool), name, "true or false", "Write it without quotes.")
    need("size" not in config.read, "read", "settings besides the size", "Give image_size.")
    need(not (config.overwrite and config.resume), "resume", "left out together with overwrite", "Continue the run or replace it.")
    need(isinstance(config.image_size, int) or (isinstance(config.image_size, tuple) and len(config.image_size) == 2), "image_size",
         "one number or (height, width)")
    need(all(whole(edge, 1) for edge in config.size), "image_size", "positive whole numbers of pixels")
    need(whole(config.patch_size, 1), "patch_size", "a positive whole number of pixels")
    if any(edge % config.patch_size for edge in config.size):
        fit = " x ".join(str(max(1, round(edge / config.patch_size)) * config.patch_size) for edge in config.size)
        raise TrainError(f"pretrain: patch_size must divide the image, got {config.patch_size} for {config.size[0]} x {config.size[1]} pixels. "
                         f"The nearest image_size that fits is {fit}.")
    need(config.channels is None or (whole(config.channels, 1) and config.channels <= MAX_CHANNELS), "channels", f"a whole number from 1 to {MAX_CHANNELS}")
    scale = config.crop_scale
    need(isinstance(scale, tuple) and len(scale) == 2 and all(real(share, 0, 1) for share in scale) and 0 < scale[0] <= scale[1], "crop_scale",
         "two shares 0 < low <= high <= 1")
    need(config.cache in (None, "ram", "disk", "device"), "cache", "ram, disk or device")
    masks = _masks()
    need(config.mask in masks.mask_names(), "mask", " | ".join(masks.mask_names()))
    own = config.mask in masks.own_names()
    need(own or not config.mask_settings, "mask_settings", f"left out with mask {config.mask}, whose settings have names of their own",
         "They are high, low, mask_ratio, min_cover and empty.")
    try:
        regions, foreground = masks.reads(config)
    except (TypeError, ValueError) as error:
        raise TrainError(f"pretrain: {error}") from error
    need(not regions or config.regions or config.prompt, "mask", "uniform without regions and prompt", "Add regions (--regions FOLDER) or a prompt (--prompt TEXT).")
    need(foreground == (config.foreground is not None), "foreground", f"given with mask {config.mask if own and foreground else 'foreground'}, and only there",
         "Make it with mwm localize --localizer threshold --prompt body.")
    need(real(config.region_weight, 0) and config.region_weight > 0, "region_weight", "a positive number")
    need(config.region_weight == 1 or config.regions or config.prompt, "region_weight", "1 without regions and prompt", "Add regions (--regions FOLDER).")
    for name in ("mask_ratio", "high", "low"):
        need(getattr(config, name) is None or real(getattr(config, name), 0, 1, open_end=True), name, "a share in [0, 1)")
    for name in ("high", "low"):
        need(regions or own or getattr(config, name) is None, name, "left out with masks that are uniform",
             "Add regions (--regions FOLDER) or a prompt (--prompt TEXT), or give --mask-ratio.")
    need(not (config.mask_ratio is not None and config.low is not None and regions and not own), "low", "left out together with mask_ratio",
         "With an overall share, the outside hides what remains.")
    need(real(config.min_cover, 0, 1) and config.min_cover > 0, "min_cover", "a share in (0, 1]")
    need(config.empty in ("mean", "low", "error"), "empty", "mean | low | error")
    need(config.decode in ("dense", "hidden"), "decode", "dense | hidden")
    need(config.densify_norm in ("auto", "batch", "layer"), "densify_norm", "auto | batch | layer")
    need(real(config.drop_path, 0, 1, open_end=True), "drop_path", "in [0, 1)")
    need(isinstance(config.cuda_graph, bool), "cuda_graph", "true or false")
    need(not (config.cuda_graph and config.drop_path), "cuda_graph", "left out with drop path, whose noise is drawn per image on the host")
    need(config.optimizer in OPTIMIZERS, "optimizer", " | ".join(OPTIMIZERS))
    need(config.precision in PRECISIONS, "precision", " | ".join(PRECISIONS))
    for name in ("epochs", "batch_size", "log_every", "panel_images", "decoder_width"):
        need(whole(getattr(config, name), 1), name, "a positive whole number")
    for name in ("checkpoint_steps", "panel_every", "seed"):
        need(whole(getattr(config, name), 0), name, "a whole number, at least 0")
    need(config.seed < 2**32, "seed", "below 2^32")
    for name in ("min_std", "min_lr", "weight_decay", "weight_decay_end", "checkpoint_minutes"):
        need(real(getattr(config, name), 0), name, "a number, at least 0")
    need(real(config.base_lr, 0) and config.base_lr > 0, "base_lr", "a positive number")
    need(config.warmup_epochs is None or real(config.warmup_epochs, 0, config.epochs), "warmup_epochs", f"in [0, epochs = {config.epochs}]")
    need(config.beta2 is None or real(config.beta2, 0, 1, open_end=True), "beta2", "in [0, 1)")
    need(config.clip is None or (real(config.clip, 0) and config.clip > 0), "clip", "a positive number")
    need(config.threads is None or whole(config.threads, 1), "threads", "a positive whole number")
    need(config.workers is None or whole(config.workers, 0), "workers", "a whole number, at least 0")
