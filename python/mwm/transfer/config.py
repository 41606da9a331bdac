"""What a fine-tuning run is told."""

from __future__ import annotations

import dataclasses
import os
import typing
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

TASKS = ("classify", "segment", "detect")
PRECISIONS = ("fp32", "bf16", "fp16")
#: Fields that may differ between a run and its continuation: they change place, speed or looks, not a number.
FREE_ON_RESUME = frozenset({"out", "overwrite", "resume", "workers", "device", "progress", "strict", "run", "data", "store_weights"})
#: What epochs, patience, batch_size and lr are where they are not given.
DEFAULTS: dict[str, dict[str, float]] = {
    "classify": {"epochs": 30, "patience": 8, "batch_size": 32, "lr": 3e-4},
    "segment": {"epochs": 40, "patience": 10, "batch_size": 16, "lr": 5e-4},
    "detect": {"epochs": 40, "patience": 10, "batch_size": 8, "lr": 2e-4},
}


class TransferError(ValueError):
    """A task that cannot start or go on; the message says what to do."""


def _help(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", tuple: "a pair of them", type(None): "None"}


def check_kinds(config: Any, command: str) -> None:
    """Refuse a value that is not of the kind its field states: `flip="no"` would count as true.

    Raises:
        TransferError: names the field.
    """
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, hint = getattr(config, item.name), hints[item.name]
        kinds = tuple(typing.get_origin(kind) or kind for kind in (typing.get_args(hint) or (hint,)))
        number = () if isinstance(value, bool) else (int, float) if isinstance(value, Integral) else (float,) if isinstance(value, Real) else ()
        if not (type(value) in kinds or set(number) & set(kinds)):
            raise TransferError(f"{command}: {item.name} must be {' or '.join(_WORDS[kind] for kind in kinds)}, got {value!r}.")


def _by_task(name: str) -> str:
    return ", ".join(f"{values[name]:g} {task}" for task, values in DEFAULTS.items())


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a fine-tuning run, checked on creation.

    Raises:
        TransferError: a value is of the wrong kind or out of its range; the message names the field.
    """

    run: str | None = _help(None, "folder of a run made by mwm pretrain, or its encoder.safetensors; left out: --encoder names a network")
    data: str = _help("", "folder with one folder per class (also below train/ val/ test/), or an index CSV with the columns file, split, label, patient, mask, boxes")
    task: str = _help("classify", "what to learn: classify | segment | detect")
    out: str | None = _help(None, "folder of the results (default: RUN/finetune, RUN/linear-probe, RUN/knn, RUN/segment or RUN/detect)")
    overwrite: bool = _help(False, "replace existing results")
    resume: bool = _help(False, "continue an interrupted run from its last finished epochs; what is finished is left as it is")
    store_weights: bool = _help(True, "keep the trained weights in the results; mwm predict needs them")

    init: str | None = _help(None, "first weights: scratch (random, those that pre-training of this seed starts from), or a file of ImageNet weights (safetensors, or a "
                                   "state dict of torch.save); default: those of RUN")
    encoder: str | None = _help(None, 'without RUN: a timm name, or "torchvision/NAME"')
    image_size: int | tuple[int, int] | None = _help(None, "without RUN: edge of the square image, or height and width; pixels (default 224)")
    channels: int | None = _help(None, "without RUN: channels of the images; default: those of the first file")
    intensity: str | None = _help(None, "auto | percentile | window=C,W | minmax; default: as the run read its images")
    aspect: str | None = _help(None, "pad | stretch | crop: how an image of another shape meets the size; default: as the run read its images")

    labels: str | None = _help(None, 'labels to keep, separated by commas, for example "bacterial,viral"; default: all')
    val_share: float = _help(0.2, "share of the training patients put aside for validation where DATA has no val split")
    test_share: float = _help(0.25, "share of the patients put aside for the test where DATA has no test split")
    label_fraction: float = _help(1.0, "share of the training patients whose labels are used; drawn by patient, smaller shares inside larger ones")
    allow_leak: bool = _help(False, "go on where a patient or a near-identical image is in two splits; the results say so")

    epochs: int | None = _help(None, f"most epochs of training (default: {_by_task('epochs')})")
    patience: int | None = _help(None, f"stop after this many epochs without a better validation figure (default: {_by_task('patience')})")
    batch_size: int | None = _help(None, f"images per step (default: {_by_task('batch_size')}; classify takes fewer where the training images are few: an eighth of "
                                         "them, but at least 8)")
    lr: float | None = _help(None, f"learning rate of the head and the last layers (default: {_by_task('lr')})")
    layer_decay: float = _help(0.75, "factor on the learning rate from one stage to the one before it")
    weight_decay: float = _help(0.05, "AdamW weight decay")
    warmup_epochs: float = _help(1.0, "epochs of linear warm-up, at most a fifth of all")
    flip: bool = _help(False, "flip half of the training images left to right")
    crop: float = _help(0.8, "least share of the image's area in a random crop; 1 = none")
    precision: str = _help("fp32", "fp32 | bf16 | fp16 (fp16 on CUDA)")

    # classify
    linear_probe: bool = _help(False, "keep the encoder frozen and fit a logistic regression on its pooled features")
    knn: bool = _help(False, "keep the encoder frozen and let the nearest training images vote, weighted by the cosine of their features")
    label_smoothing: float = _help(0.0, "share of the target spread over all classes")
    mixup: float = _help(0.0, "parameter of the beta distribution that mixes pairs of images; 0 = none, 0.2 is usual")
    balanced: bool = _help(True, "weight classes by the inverse of their frequency in training")

    # segment
    masks: str | None = _help(None, "folder of the masks, found by the names of the images, where DATA has no column mask")
    mask_values: str | None = _help(None, 'names of the values of the masks, for example "100=ground_glass,200=consolidation"; default: one foreground')
    mask_per_label: bool = _help(False, "the foreground of each image is of the class of its label, instead of one class for all")
    negatives: str | None = _help(None, 'labels with nothing to mark, separated by commas, for example "no_tumor": their images count as empty masks where '
                                        "they have none; others without a mask are left out")
    surface_tolerance: float = _help(2.0, "distance up to which surfaces agree in the surface Dice: mm where all images tell their spacing, else pixels")
    head_width: int = _help(64, "channels of the mask head")
    head_norm: str = _help("group", "group | batch: norm of the mask head")

    # detect
    images: str | None = _help(None, "folder that the file names of a COCO file start from (default: where its first image is found: beside the file, or in images/)")
    detect_masks: bool = _help(True, "learn masks where most images have them (Mask R-CNN), else boxes alone (Faster R-CNN)")
    detect_width: int = _help(256, "channels of the feature pyramid and of the heads for boxes and masks")
    detect_norm: str = _help("batch", "batch | frozen: batch norms of the encoder learn their statistics, or keep those of the training images (for batches below 8)")

    strict: bool = _help(False, "stop at an unreadable file instead of leaving it out")
    bootstrap: int = _help(2000, "draws of the intervals")
    seed: int = _help(0, "seed of splits, label fraction, order, crops, head, and of random first weights")
    workers: int = _help(0, "threads that read images; 0 = one per CPU, at most 8")
    device: str = _help("auto", "auto | cpu | cuda | cuda:N")
    progress: bool = _help(True, "show progress bars")

    def __post_init__(self) -> None:
        for name in ("run", "data", "out", "init", "masks", "images"):  # paths are stored as text, so that the settings can be written down
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        if isinstance(self.image_size, list):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        for name, value in DEFAULTS.get(self.task, {}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_kinds(self, "finetune")
        self._check()
        self._check_classify()
        self._check_segment()
        self._check_detect()

    def _check(self) -> None:
        self._require("task", self.task in TASKS, " | ".join(TASKS))
        self._require("run", self.run is None or bool(self.run), "the folder of a run")
        self._require("data", bool(self.data), "a folder or an index CSV")
        if self.run is None:
            self._require("encoder", bool(self.encoder), "the name of a network where no RUN is given")
            self._require("init", bool(self.init), "scratch, or a file of weights, where no RUN is given")
            self._require("out", bool(self.out), "a folder where no RUN is given")
        else:
            for name in ("encoder", "image_size", "channels"):
                self._require(name, getattr(self, name) is None, "left out where RUN is given, which has its own")
        edges = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        self._require("image_size", self.image_size is None or (len(edges) <= 2 and all(isinstance(e, int) and 16 <= e <= 8192 for e in edges)), "16 … 8192 pixels")
        self._require("channels", self.channels is None or 1 <= self.channels <= 64, "1 … 64")
        self._require("aspect", self.aspect in (None, "pad", "stretch", "crop"), "pad | stretch | crop")
        for name in ("epochs", "patience", "batch_size", "bootstrap"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("val_share", "test_share"):
            self._require(name, 0 < getattr(self, name) < 1, "between 0 and 1")
        for name in ("crop", "label_fraction", "layer_decay"):
            self._require(name, 0 < getattr(self, name) <= 1, "in (0, 1]")
        self._require("lr", self.lr > 0, "positive")
        for name in ("warmup_epochs", "weight_decay", "workers", "seed"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("precision", self.precision in PRECISIONS, " | ".join(PRECISIONS))
        self._require("labels", self.labels is None or bool(self.label_names), "names separated by commas")
        self._require("resume", not (self.resume and self.overwrite), "left out where overwrite is given")

    def _check_classify(self) -> None:
        self._require("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")
        self._require("mixup", 0 <= self.mixup <= 10, "in [0, 10]")
        self._require("knn", not (self.knn and self.linear_probe), "left out where linear_probe is given")
        for name in ("knn", "linear_probe"):
            self._require(name, not getattr(self, name) or self.task == "classify", f"left out of task {self.task}")

    def _check_segment(self) -> None:
        """Ranges of the block `segment`."""
        for name in ("masks", "mask_values", "negatives"):
            self._require(name, getattr(self, name) is None or self.task != "classify", "left out of task classify")
        self._require("mask_per_label", not (self.mask_per_label and self.mask_values), "left out where mask_values is given")
        self._require("surface_tolerance", 0 <= self.surface_tolerance < float("inf"), "0 or more")
        self._require("head_width", 8 <= self.head_width <= 2048 and self.head_width % 8 == 0, "a multiple of 8 from 8 to 2048")
        self._require("head_norm", self.head_norm in ("group", "batch"), "group | batch")

    def _check_detect(self) -> None:
        self._require("detect_width", 16 <= self.detect_width <= 1024 and self.detect_width % 8 == 0, "a multiple of 8 from 16 to 1024")
        self._require("detect_norm", self.detect_norm in ("batch", "frozen"), "batch | frozen")
        self._require("images", self.images is None or self.task == "detect", f"left out of task {self.task}")

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise TransferError(f"finetune: {name} must be {wanted}, got {getattr(self, name)!r}.")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images where no RUN gives them, pixels."""
        return (224, 224) if self.image_size is None else self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """`labels` as names."""
        return None if self.labels is None else tuple(name.strip() for name in self.labels.split(",") if name.strip())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()}
