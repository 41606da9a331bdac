"""Masks that a user has, as regions: read, compared with their image's size, and found by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import readers
from .errors import DataError, UnreadableImage
from .geometry import resize
from .records import Record
from .settings import ReadSettings
from .walk import check_inside

ASPECT_TOLERANCE = 0.01
"""Relative difference of aspect ratios up to which a mask may be of another size than its image: the rounding of a resize."""

_ENDINGS = ("", "_mask", "-mask", "_seg", "-seg", "_region")
_SOFT = 32  # distinct values from which an integer mask counts as soft


def read_mask(mask: str | Path, size: tuple[int, int] | None = None, *, frame: str | None = None, label: int | None = None,
              settings: ReadSettings | None = None) -> Tensor:
    """Read a mask as a region.

    Integers: 8-bit masks that reach 255, and those of more than 32 distinct values, are value / largest of the type;
    others are labels, of which every one above 0, or `label` alone, is region. Floats must be in [0, 1], else they are labels
    too. Of colours, the brightest counts.

    Args:
        mask: File in any format of images.
        size: (height, width) of the image it belongs to; None for its own.
        frame: Slice or frame, as in `Record.frame`; a volume's mask is sliced as the volume.
        label: The one label that is region.
        settings: Of which the orientation is used.

    Returns:
        float32 [H, W] in [0, 1].

    Raises:
        DataError: it cannot be read, holds NaN, or its shape is not that of the image.
    """
    path = Path(mask)
    try:
        values = readers.read(path, frame, settings or ReadSettings()).values.max(0)
    except UnreadableImage as error:
        raise DataError(f"mask: {path.name} cannot be used: {error}. Repair or remove it.") from error
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DataError(f"mask: {path.name} must hold finite values, got NaN or infinity. Write 0 where there is no region.")
    if label is not None:
        region = values == label
    elif values.dtype.kind == "f" and values.min(initial=0) >= 0 and values.max(initial=0) <= 1:
        region = values
    elif values.dtype.kind == "u" and _is_soft(values):
        region = values / np.iinfo(values.dtype).max
    else:
        region = values > 0
    tensor = torch.from_numpy(np.ascontiguousarray(region, np.float32))
    return tensor if size is None else match_size(tensor, size, path.name)


def match_size(region: Tensor, size: tuple[int, int], name: str) -> Tensor:
    """Bring a region to the size of its image, where it is the same picture in other pixels.

    Args:
        region: float32 [h, w].
        size: (height, width) of the image.
        name: For the message.

    Raises:
        DataError: the aspect ratios differ.
    """
    height, width = region.shape
    if (height, width) == tuple(size):
        return region
    a, b = height * size[1], width * size[0]
    slack = max(ASPECT_TOLERANCE * max(a, b), (size[0] + size[1]) / 2)  # at least the rounding of both edges by half a pixel
    if abs(a - b) > slack:
        raise DataError(f"region: {name} must have the shape of its image, got {height} x {width} for an image of {size[0]} x {size[1]} pixels. "
                        "Give the region of this image, at its own size.")
    return resize(region[None], size)[0].clamp(0, 1)


class MaskFolder:
    """Masks found by the names of their images: the same relative name, or the same stem, perhaps with _mask, -mask, _seg, -seg or _region behind.

    A mask belongs to one image: where a mask without folders in its name fits images of several folders, the second image that asks for it is refused.

    Args:
        folder: Where they are.

    Raises:
        DataError: there is no such folder, it is empty, or a link in it leads outside.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise DataError(f"regions: {str(folder)!r} must be a folder of regions or masks, which is not there. Make it with mwm localize, or check the path.")
        self._by_stem: dict[str, list[Path]] = {}
        self._by_name: set[str] = set()
        self._owners: dict[Path, str] = {}
        root = self.folder.resolve()
        for path in sorted(self.folder.rglob("*")):
            if path.is_symlink():
                check_inside(path, root)
            relative = path.relative_to(self.folder)
            if path.is_file() and not any(part.startswith(".") for part in relative.parts) and readers.is_image_name(path):
                self._by_stem.setdefault(stem_of(relative.as_posix()), []).append(path)
                self._by_name.add(relative.as_posix())
        if not self._by_stem:
            raise DataError(f"regions: {str(folder)!r} must hold regions or masks, got none. Make them with mwm localize, or check the path.")

    def find(self, record: Record) -> Path | None:
        """The mask of an image, or None.

        Raises:
            DataError: several files fit, or the file is the mask of another image.
        """
        file = record.name.removesuffix(f"#{record.frame}") if record.frame else record.name
        if file in self._by_name:
            return self._owned(self.folder / file, file)
        stem = stem_of(file)
        for base in dict.fromkeys((stem, stem.rpartition("/")[2])):
            for ending in _ENDINGS:
                found = self._by_stem.get(base + ending, [])
                if len(found) > 1:
                    names = ", ".join(path.name for path in found[:3])
                    raise DataError(f"regions: each image must have one mask, got {len(found)} for {record.name} ({names}). Remove all but one.")
                if found:
                    return self._owned(found[0], file)
        return None

    def _owned(self, path: Path, file: str) -> Path:
        owner = self._owners.setdefault(path, file)
        if owner != file:
            raise DataError(f"regions: each image must have a mask of its own, but {path.name} fits both {owner} and {file}. Put the masks into folders like those of the images.")
        return path

    def has(self, record: Record) -> bool:
        """Whether an image has a mask."""
        return self.find(record) is not None

    def region(self, record: Record, settings: ReadSettings) -> Tensor | None:
        """The mask of an image as a region of its own size, float32 [h, w], or None where there is none."""
        path = self.find(record)
        return None if path is None else read_record_mask(path, record, settings)


def read_record_mask(path: Path, record: Record, settings: ReadSettings) -> Tensor:
    """The mask of a record: of a volume's slice, the same slice of the mask volume. float32 [h, w]"""
    several = bool(readers.frames(path, replace(settings, slice_axis=_axis(record) or settings.slice_axis)))
    return read_mask(path, frame=record.frame if several else None, settings=settings)


def stem_of(name: str) -> str:
    """A relative name without the extensions of image files."""
    lower = name.lower()
    for extension in sorted(readers.EXTENSIONS, key=len, reverse=True):
        if lower.endswith(extension):
            return name[: -len(extension)]
    return name


def _is_soft(values: np.ndarray) -> bool:
    top = np.iinfo(values.dtype).max
    return bool(values.max(initial=0) == top) or len(np.unique(values)) > _SOFT


def _axis(record: Record) -> str | None:
    return record.frame[0] if record.frame and record.frame[0] in "xyz" else None
