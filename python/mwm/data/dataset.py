"""Images with their regions, as a data set that holds no state between items."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from . import blob
from .errors import DataError, MissingRegion
from .geometry import fit
from .image import content_digest, decode
from .masks import match_size
from .ram import Decoded, RamCache
from .records import Record
from .regions import RegionStore, open_regions, warn_of_other_settings
from .settings import ReadSettings

_LEVELS = np.float32(65535)


class PretrainDataset(Dataset):
    """Images and regions of a list.

    An item is a dict: image float32 [C, H, W] in [0, 1]; region float32 [H, W] in [0, 1], zeros where no regions are read (with `foreground`
    [2, H, W]: the region, then what is not air); id; index.
    A key is an index, or (epoch, index), of which crops and flips are a pure function: workers hold no state, so neither their
    number nor the moment a run was interrupted matters. Images are kept in steps of 1/65535, whether cached or not, so that caching
    changes no number.

    Args:
        records: The images.
        settings: How they are read.
        regions: A folder of `mwm localize`, a folder of masks, "masks" for the CSV's column, a store, maps by id, or None.
        foreground: The same for a second map, that of what is not air.
        transform: `JointTransform`, or None for images at `settings.size`.
        channels: Grey ↔ colour conversion; None keeps the file's.
        seed: Of the transform.
        view: Number of the view within the epoch.
        cache: Decoded images: "ram" (one copy, shared by forked workers, where `size` and `channels` are set), "disk" (in
            `$XDG_CACHE_HOME/mwm/images`, else `~/.cache/mwm/images`), another folder for it, or None. Entries on disk are named by a
            hash of content and settings and hold pixels only.

    Raises:
        DataError: the regions are not there, or belong to none of the images.
    """

    def __init__(self, records: Sequence[Record], settings: ReadSettings | None = None, regions: str | Path | RegionStore | Mapping[int, Tensor] | None = None,
                 transform: Callable[..., tuple[Tensor, Tensor]] | None = None, *, channels: int | None = None, seed: int = 0, view: int = 0,
                 cache: str | Path | None = None, foreground: str | Path | RegionStore | Mapping[int, Tensor] | None = None) -> None:
        self.records, self.settings, self.transform = list(records), settings or ReadSettings(), transform
        self.channels, self.seed, self.view = channels, seed, view
        self._ram = RamCache(len(self.records)) if str(cache) == "ram" else None
        self.cache_folder = None if cache is None or self._ram is not None else default_cache_folder() if str(cache) == "disk" else Path(cache).expanduser()
        self.regions = None if regions is None else open_regions(regions)
        self.foreground = None if foreground is None else open_regions(foreground)
        self._digests: dict[int, str] = {}
        for store, source in ((self.regions, regions), (self.foreground, foreground)):
            if store is not None:
                for sentence in warn_of_other_settings(store, self.settings):
                    warnings.warn(sentence, stacklevel=2)
                self._check_regions(store, source)
        if self._ram is not None and self.settings.size is not None and channels is not None:
            self._ram.prepare((channels, *self.settings.size))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """One item.

        Raises:
            UnreadableImage: the file cannot be read, or (`MissingRegion`) has no region: leave it out.
            DataError: its region does not fit it.
        """
        epoch, index = key if isinstance(key, tuple) else (0, int(key))
        record = self.records[index]
        values, stored, spacing = self._image(index)
        image = torch.from_numpy(values.astype(np.float32) / _LEVELS)
        region = self._region(self.regions, record, (image.shape[1], image.shape[2]), stored, spacing)
        if self.foreground is not None:
            region = torch.stack([region, self._region(self.foreground, record, (image.shape[1], image.shape[2]), stored, spacing)])
        if self.transform is not None:
            image, region = self.transform(image, region, seed=self.seed, id=record.id, epoch=epoch, view=self.view)
        return {"image": image, "region": region, "id": record.id, "index": index}

    def _region(self, store: RegionStore | None, record: Record, size: tuple[int, int], stored: tuple[int, int], spacing: tuple[float, float] | None) -> Tensor:
        """The region through the same steps as its image. float32 [H, W]"""
        if store is None:
            return torch.zeros(size)
        region = store.region(record, self.settings)
        if region is None:
            raise MissingRegion(f"{record.name} has no region. Run mwm localize on it, or add a mask of its name.")
        region = match_size(region, stored, f"that of {record.name}")
        return fit(region[None], self.settings, spacing)[0].clamp(0, 1)

    def _image(self, index: int) -> Decoded:
        """Quantised image uint16 [C, H, W], the size of the stored one, and its pixel spacing."""
        if self._ram is not None:
            found = self._ram.get(index)
            if found is None:
                self._ram.put(index, found := self._decode(index))
            return found
        return self._from_disk(index, self.cache_folder) if self.cache_folder is not None else self._decode(index)

    def _decode(self, index: int) -> Decoded:
        image, stored, spacing = decode(self.records[index], self.settings, channels=self.channels)
        return (image.numpy() * _LEVELS).round().astype(np.uint16), stored, spacing

    def _from_disk(self, index: int, folder: Path) -> Decoded:
        if index not in self._digests:
            self._digests[index] = content_digest(self.records[index])
        key = blob.key(self._digests[index], repr(sorted(self.settings.to_dict().items())), str(self.channels))
        path = folder / key[:2] / f"{key[2:]}.image"
        try:
            values, facts = blob.read_array(path), _facts(blob.read_array(path.with_suffix(".size")))
        except (OSError, blob.CorruptEntry):
            values, stored, spacing = self._decode(index)
            try:
                blob.write_array(path.with_suffix(".size"), np.array([*stored, *(spacing or (0, 0))], "<f8").view(np.uint8), packed=False)
                blob.write_array(path, values, packed=False)
            except OSError as error:
                raise DataError(f"data set: the disk cache in {folder} cannot be written ({error.strerror}). Free some space, or leave out --cache disk.") from error
            return values, stored, spacing
        spacing = (float(facts[2]), float(facts[3])) if facts[2] > 0 else None
        return values, (int(facts[0]), int(facts[1])), spacing

    def _check_regions(self, store: RegionStore, source: Any) -> None:
        """Refuse regions of other images at once, not after an hour; a single image without one is left out later."""
        if self.records and not any(store.has(record) for record in self.records):
            shown = str(source) if isinstance(source, (str, Path)) else type(source).__name__
            raise DataError(f"regions: {shown!r} must hold regions of these images, got none that belongs to one of the {len(self.records)}. "
                            "Paths relative to IMAGES must be those that mwm localize saw; or name masks like their images.")


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack items: image [B, C, H, W], region [B, H, W] or [B, 2, H, W], id and index int64 [B].

    Raises:
        DataError: the images differ in size or channels.
    """
    shapes = {tuple(sample["image"].shape) for sample in samples}
    if len(shapes) > 1:
        raise DataError(f"data set: images of a batch must have one shape, got {' and '.join(map(str, sorted(shapes)[:2]))}. Set size, and channels for a mix of grey and colour.")
    return {
        "image": torch.stack([sample["image"] for sample in samples]),
        "region": torch.stack([sample["region"] for sample in samples]),
        "id": torch.tensor([sample["id"] for sample in samples], dtype=torch.int64),
        "index": torch.tensor([sample["index"] for sample in samples], dtype=torch.int64),
    }


def _facts(stored: NDArray) -> NDArray[np.float64]:
    """Height, width and pixel spacing of a cached image in full precision: in float32 a region may come out a pixel larger than beside the image that is not cached.

    Raises:
        CorruptEntry: it is something else.
    """
    if stored.dtype != np.uint8 or stored.shape != (32,):
        raise blob.CorruptEntry
    return stored.view("<f8")


def default_cache_folder() -> Path:
    """Where decoded images are kept unless told otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mwm" / "images"
