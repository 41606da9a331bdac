"""What the masks of a data set mean: which values are which class, and how a file becomes labels per pixel."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mwm.data import ReadSettings, Record, UnreadableImage, readers
from mwm.transfer.config import FinetuneConfig, TransferError
from mwm.transfer.labelled import Case, Labelled, check_splits

FOREGROUND = "foreground"
_SOFT = 32  # distinct values from which a mask that reaches the top of its type has soft edges (as in mwm.data.masks)
_MOST = 254  # classes: labels are kept in 8 bits


@dataclass(frozen=True)
class MaskClasses:
    """The foreground classes of a task; class k of a label map is names[k - 1], 0 is background.

    Attributes:
        names: Of the foreground classes.
        values: What stands for each of them in the files; None: anything but 0 of a two-valued mask is foreground.
        per_label: Whether the class is that of the image's label.
    """

    names: tuple[str, ...]
    values: tuple[int, ...] | None = None
    per_label: bool = False

    def to_json(self) -> str:
        """As text, for the metadata of weights."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> MaskClasses:
        """From `to_json`."""
        stored = json.loads(text)
        return cls(tuple(stored["names"]), None if stored["values"] is None else tuple(stored["values"]), bool(stored["per_label"]))

    def check(self) -> None:
        """Refuse what no training wrote.

        Raises:
            ValueError: names are missing, double or too many, or values do not fit them.
        """
        names, values = self.names, self.values
        if not 0 < len(names) <= _MOST or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise ValueError("names of masks must be different texts")
        if values is not None and not (len(values) == len(set(values)) == len(names) and all(isinstance(value, int) and 0 < value < 2**16 for value in values)):
            raise ValueError("values of masks must be different whole numbers below 65536, one per name")

    @property
    def written(self) -> tuple[int, ...]:
        """The value that stands for each class in a PNG: that of the masks it learnt from where it fits into 8 bits, 255 for one foreground, else 1, 2, …"""
        if self.values is not None and max(self.values) <= 255:
            return self.values
        return (255,) if len(self.names) == 1 else tuple(range(1, len(self.names) + 1))

    @property
    def labels(self) -> tuple[int, ...]:
        """The value that stands for each class in a NIfTI file: that of the masks it learnt from, else 1, 2, …"""
        return self.values if self.values is not None else tuple(range(1, len(self.names) + 1))


def mask_classes(config: FinetuneConfig, data: Labelled) -> MaskClasses:
    """The classes that the settings ask for.

    Raises:
        TransferError: `mask_values` is no list of VALUE=NAME, or `mask_per_label` meets images without a label.
    """
    if config.mask_values is not None:
        return MaskClasses(*_values(config.mask_values))
    if config.mask_per_label:
        if any(case.label < 0 for case in data.cases) or not data.classes:
            raise TransferError("finetune: mask_per_label must meet images with labels, got some without. Fill the column label, or leave --mask-per-label out.")
        return MaskClasses(data.classes, per_label=True)
    return MaskClasses((FOREGROUND,))


def _values(text: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    names = tuple(name.strip() for _, _, name in pairs)
    try:
        values = tuple(int(value) for value, _, _ in pairs)
    except ValueError:
        values = ()
    if not pairs or len(values) != len(names) or not all(names) or len(set(names)) < len(names) or len(set(values)) < len(values) or not all(
            0 < value < 2**16 for value in values) or len(names) > _MOST:
        raise TransferError(f'finetune: mask_values must be different VALUE=NAME pairs with values from 1, separated by commas, got {text!r}. For example '
                            '"100=ground_glass,200=consolidation".')
    return names, values


def with_masks(config: FinetuneConfig, data: Labelled) -> Labelled:
    """The images to learn from: those with a mask, and those that `negatives` says have nothing to mark.

    Raises:
        TransferError: no image has a mask, a label of `negatives` does not occur, or a split is left without images.
    """
    wanted = {name.strip() for name in (config.negatives or "").split(",") if name.strip()}
    unknown = sorted(wanted - set(data.classes))
    if unknown:
        raise TransferError(f"finetune: negatives must be labels of DATA, got {unknown[0]!r}. It has {', '.join(data.classes) or 'none'}.")
    if not any(case.mask for case in data.cases):
        raise TransferError("finetune: DATA must hold masks, got none. Fill the column mask, or name their folder with --masks.")
    kept, empty, without = [], 0, 0
    for case in data.cases:
        if case.mask is not None:
            kept.append(case)
        elif case.label >= 0 and data.classes[case.label] in wanted:
            kept.append(case)
            empty += 1
        else:
            without += 1
    notes = list(data.notes)
    if without:
        notes.append(f"{without} images without a mask are left out; an image with nothing to mark needs an empty mask, or its label in --negatives.")
    if empty:
        notes.append(f"{empty} images without a mask count as empty masks because of their label ({', '.join(sorted(wanted))}).")
    if len(kept) < len(data.cases):
        check_splits(kept, data.classes, need=data.need, allow_leak=True)
    return replace(data, cases=tuple(kept), notes=tuple(notes))


def read_truth(case: Case, classes: MaskClasses, size: tuple[int, int], settings: ReadSettings) -> NDArray[np.uint8]:
    """The labels of an image's pixels.

    A coloured palette whose entry 0 is black gives its numbers. Without named values a mask has 0 and one other value: 255, or 1, or
    both ends of soft edges (cut at half). One that is 0 everywhere says that there is nothing to mark; so does no mask, of a case that
    `with_masks` has kept.

    Args:
        case: Of which `mask`, `label` and `record` are used.
        classes: What values mean.
        size: (height, width) of the stored image.
        settings: How volumes are cut into slices; the orientation.

    Returns:
        0 = background, k = class k. uint8 [height, width]

    Raises:
        UnreadableImage: the file cannot be read.
        TransferError: another size than the image's, or values that nothing explains.
    """
    if case.mask is None:
        return np.zeros(size, np.uint8)
    values, is_slice = _stored(case.mask, case.record, settings)
    name = case.mask.name
    if values.shape != tuple(size):
        raise TransferError(f"finetune: masks must have the size of their image, got {name} with {values.shape[0]} x {values.shape[1]} pixels for an image of "
                            f"{size[0]} x {size[1]}. Give the mask of this image, at its own size.")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise TransferError(f"finetune: masks must hold finite values, got NaN or infinity in {name}. Write 0 where there is nothing.")
    if classes.values is not None:
        return _named(values, classes, name)
    foreground = _foreground(values, name, is_slice=is_slice)
    return foreground.astype(np.uint8) * np.uint8(case.label + 1 if classes.per_label else 1)


def _stored(path: Path, record: Record, settings: ReadSettings) -> tuple[NDArray, bool]:
    """Values as stored, of colours see `_of_colours`, and whether they are a slice of a volume. [H, W]"""
    axis = record.frame[0] if record.frame and record.frame[0] in "xyz" else None
    several = bool(readers.frames(path, replace(settings, slice_axis=axis) if axis else settings))
    try:
        return _of_colours(path, readers.read(path, record.frame if several else None, settings).values, settings), several
    except UnreadableImage as error:
        raise UnreadableImage(f"mask {path.name} cannot be used: {error}.") from error


def _of_colours(path: Path, colours: NDArray, settings: ReadSettings) -> NDArray:
    """One value per pixel: the numbers of a palette whose entry 0 is black, as labelling tools write them; else the brightest channel, where there is one colour.

    Args:
        path: The file, which `readers.read` has decoded and found within its limits.
        colours: What it decoded. [C, H, W]
        settings: Of which the orientation is used.
    """
    if (colours == colours[:1]).all():
        return colours[0]
    if path.suffix.lower() == ".png":
        with Image.open(path) as image:
            if image.mode == "P" and image.getpalette()[:3] == [0, 0, 0]:
                return np.array(ImageOps.exif_transpose(image) if settings.orientation == "canonical" else image)
    if colours.dtype.kind == "u":
        codes = np.unique(sum(plane.astype(np.int64) << 16 * k for k, plane in enumerate(colours)))
        if 1 < np.count_nonzero(codes) <= _SOFT:
            raise TransferError(f"finetune: masks must tell their classes by numbers, got {np.count_nonzero(codes)} colours in {path.name}. Save grey values, or a palette whose "
                                "entry 0 is black.")
    return colours.max(0)


def _named(values: NDArray, classes: MaskClasses, name: str) -> NDArray[np.uint8]:
    result = np.zeros(values.shape, np.uint8)
    known = values == 0
    for k, value in enumerate(classes.values or (), 1):
        here = values == value
        result[here] = k
        known |= here
    if not known.all():
        raise TransferError(f"finetune: values of masks must be 0 or named by --mask-values, got {_listed(values[~known])} in {name}. Name them, or repair the mask.")
    return result


def _foreground(values: NDArray, name: str, *, is_slice: bool) -> NDArray[np.bool_]:
    found = np.unique(values)
    top = float(found[-1])
    if top == 0 and len(found) == 1:
        return np.zeros(values.shape, bool)
    if values.dtype.kind == "f" and found[0] >= 0 and top <= 1:
        return values > 0.5
    if values.dtype.kind == "u" and top == np.iinfo(values.dtype).max and ((len(found) <= 2 and found[0] in (0, top)) or len(found) > _SOFT):
        return values > top / 2
    # In a slice of a volume a label alone may fill the picture; in a picture of one grey value it is unlikely to be meant.
    if (len(found) == 2 and found[0] == 0) or (is_slice and len(found) == 1 and top == 1):
        return values > 0
    if len(found) == 1:
        raise TransferError(f"finetune: masks must be 0 where there is nothing and 255 where there is something, got {top:g} everywhere in {name}. Write 0 or 255, "
                            f"or name the value with --mask-values {top:g}=NAME.")
    raise TransferError(f"finetune: masks must have 0 and one other value, got {_listed(found)} in {name}. Name the values with --mask-values, for example "
                        f"{found[-1]:g}=NAME.")


def _listed(values: NDArray) -> str:
    found: Sequence = np.unique(values)
    return ", ".join(f"{value:g}" for value in found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
