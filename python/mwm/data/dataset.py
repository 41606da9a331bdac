"""Images with their regions, decoded once where asked."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mwm.data.errors import DataError
from mwm.data.image import fit, read_image
from mwm.data.records import Record
from mwm.data.regions import MaskFolder, RegionCache, open_regions, write_atomic
from mwm.data.settings import ReadSettings

_ASPECT = 0.02  # relative difference of aspect ratios that rounding of a resize explains


class PretrainDataset(Dataset):
    """Images and regions at one size.

    Values are rounded to 16 bits (images) and 8 bits (regions) whether cached or not, so that a cache changes no number.

    Args:
        records: of `read_list`.
        settings: how images are read; `size` set for batches.
        regions: a folder made by `mwm localize`, a folder of masks, "masks" (the `mask` column of the index), an open
            `RegionCache`, or None: then the region is empty.
        transform: `JointTransform`-like; called with seed 0 and epoch 0 unless the key is (epoch, index).
        cache: None decodes every time, "ram" keeps decoded images in memory, a folder keeps them on disk.
        seed: for the transform.
        channels: as `read_image`.
    """

    def __init__(self, records: Sequence[Record], settings: ReadSettings, regions: str | Path | RegionCache | MaskFolder | None = None,
                 transform: Callable | None = None, *, cache: str | Path | None = None, seed: int = 0, channels: int | None = None) -> None:
        self.records, self.settings, self.transform, self.seed, self.channels = records, settings, transform, seed, channels
        self.regions = open_regions(regions) if isinstance(regions, (str, Path)) else regions
        self.cache = None if cache is None else _Ram() if str(cache) == "ram" else _Disk(Path(cache))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """{"image": float32 [C, H, W] in [0, 1], "region": float32 [H, W] in [0, 1], "id": int, "index": int}"""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        record = self.records[index]
        image = self._image(record).to(torch.int32).float() / 65535
        region = self._region(record, tuple(image.shape[1:]))
        if self.transform is not None:
            image, region = self.transform(image, region, seed=self.seed, id=record.id, epoch=epoch, view=0)
        return {"image": image, "region": region, "id": record.id, "index": index}

    def _image(self, record: Record) -> Tensor:
        """uint16 [C, H, W]"""
        if self.cache is None:
            return self._decode(record)
        settings = json.dumps([self.settings.to_dict(), self.channels, record.frame], sort_keys=True)
        return self.cache.get(record, settings, lambda: self._decode(record))

    def _decode(self, record: Record) -> Tensor:
        image = read_image(record, self.settings, self.channels)
        return (image.double() * 65535).round().to(torch.int32).to(torch.uint16)

    def _region(self, record: Record, size: tuple[int, int]) -> Tensor:
        if self.regions is None:
            return torch.zeros(size)
        region = self.regions.region(record)
        if tuple(region.shape) == size:
            return region
        stored = ReadSettings(**{**self.settings.to_dict(), "size": None})
        height, width = read_image(record, stored).shape[1:]
        if abs(region.shape[0] * width - region.shape[1] * height) > _ASPECT * region.shape[0] * width:
            raise DataError(f"regions: the region of {record.name} must be {height}x{width} pixels like the image, got {region.shape[0]}x{region.shape[1]}. "
                            "Localize these images again, or give masks of the images' size.")
        if tuple(region.shape) != (height, width):
            region = fit(region[None], (height, width), "stretch")[0]
        region = fit(region[None], size, self.settings.aspect)[0]
        return (region * 255).round() / 255


class _Ram:
    """Decoded images in this process's memory."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def get(self, record: Record, settings: str, decode: Callable[[], Tensor]) -> Tensor:
        if record.id not in self._kept:
            self._kept[record.id] = decode()
        return self._kept[record.id]


class _Disk:
    """Decoded images as .npy files named by the hash of the file's content and the settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser()

    def get(self, record: Record, settings: str, decode: Callable[[], Tensor]) -> Tensor:
        digest = blake2b(settings.encode(), digest_size=20)
        with open(record.path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        name = digest.hexdigest()
        path = self.folder / name[:2] / f"{name}.npy"
        try:
            return torch.from_numpy(np.load(path, allow_pickle=False).astype(np.uint16, copy=False))
        except (OSError, ValueError, EOFError):  # not there yet, or cut off by a crash of another program
            image = decode()
            path.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            np.save(buffer, image.numpy(), allow_pickle=False)
            write_atomic(path, buffer.getvalue())
            return image


def image_statistics(dataset: Dataset) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel over all pixels of a data set, in float64.

    Raises:
        DataError: the data set is empty.
    """
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    pixels = 0
    for index in range(len(dataset)):
        image = dataset[index]["image"].double()
        total, squares, pixels = total + image.sum((1, 2)), squares + image.square().sum((1, 2)), pixels + image[0].numel()
    if pixels == 0:
        raise DataError("statistics: a data set must hold at least one image, got none.")
    mean = total / pixels
    return mean.tolist(), (squares / pixels - mean.square()).clamp(min=0).sqrt().tolist()
