"""Regions on disk, keyed by what they were made from, and regions as a data set reads them."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from . import blob, region_grid
from .errors import DataError
from .limits import MAX_LIST_BYTES
from .masks import MaskFolder, read_record_mask
from .records import Record
from .settings import ReadSettings

INDEX = "regions.json"
_FORMAT, _WITH_GRIDS = "mwm regions 1", "mwm regions 2"  # the second where a region is kept as a grid, which versions before could not read
_ID, _KEY = re.compile(r"[0-9a-f]{8}"), re.compile(r"[0-9a-f]{32}")
_PART = re.compile(r"part-\d+-of-\d+\.json|\.(part-\d+-of-\d+|regions)\.json\.\d+\.[0-9a-f]+\.tmp")


class RegionCache:
    """A folder of regions.

    A region lies under the hash of everything it depends on (see `key`), as 8-bit values, round(255 r): the precision that
    `region_coverage` counts in; a soft one as grid and outline, where that gives the same to 1/255 (see `mwm.data.region_grid`).
    `regions.json` says which region belongs to which image id, and, in `meta`, how they were made. No file name and no header
    text is written.

    Args:
        folder: Made when something is written.

    Raises:
        DataError: `regions.json` is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        stored = _read_index(self.folder / INDEX)
        self.meta: dict[str, Any] = dict(stored.get("meta") or {})
        self._meta_before = json.dumps(self.meta, sort_keys=True, default=str)
        self._keys: dict[str, str] = dict(stored.get("regions") or {})
        self._fresh: dict[str, str] = {}
        self._format: str = stored.get("format", _FORMAT)

    @staticmethod
    def key(*parts: str | bytes) -> str:
        """BLAKE2b of the parts, each preceded by its length, so that no two lists of parts run together. 32 hexadecimal digits."""
        return blob.key(*parts)

    def __contains__(self, key: str) -> bool:
        """Whether a whole region is stored under the key; a damaged one counts as missing, so that it is made again."""
        try:
            self.get(key)
        except KeyError:
            return False
        return True

    contains = __contains__

    def put(self, key: str, region: Tensor | np.ndarray, *, surface: Tensor | None = None, grid: tuple[int, int] | None = None) -> None:
        """Store a region atomically.

        Args:
            key: From `key`.
            region: float [H, W] in [0, 1].
            surface: The map that the values of a soft region are taken from. float [H, W]
            grid: Rows and columns of that map before it was brought to the image's size; with `surface` the region is kept as a grid where that is exact enough.

        Raises:
            DataError: it is no such map.
            OSError: the disk is full; regions already there are whole.
        """
        values = torch.as_tensor(region).detach().cpu().float()
        if values.ndim != 2 or not values.numel() or not bool(torch.isfinite(values).all()) or float(values.min()) < 0 or float(values.max()) > 1:
            raise DataError(f"regions: region must be a finite map [H, W] in [0, 1], got {tuple(values.shape)}.")
        stored = (values * 255).round().to(torch.uint8).numpy()
        coarse = region_grid.encode(stored, surface.detach().cpu().float().numpy(), grid) if surface is not None and grid is not None else None
        if coarse is not None:
            self._format = _WITH_GRIDS
        blob.write_array(self._path(key), stored if coarse is None else coarse, packed=True, durable=False)

    def get(self, key: str) -> Tensor:
        """The region under a key. float32 [H, W] in [0, 1]

        Raises:
            KeyError: there is none, or it is damaged; make it again.
        """
        try:
            values = blob.read_array(self._path(key))
            if values.ndim == 1 and values.dtype == np.uint8:
                values, self._format = region_grid.decode(values), _WITH_GRIDS
            if values.ndim != 2 or values.dtype != np.uint8:
                raise blob.CorruptEntry
            return torch.from_numpy(values.astype(np.float32) / np.float32(255))
        except (OSError, blob.CorruptEntry) as error:
            raise KeyError(key) from error

    def assign(self, record_id: int, key: str) -> None:
        """Say which region belongs to an image; `save` writes it down."""
        self._fresh[f"{record_id:08x}"] = key

    def save(self, part: tuple[int, int] | None = None) -> None:
        """Write the assignments and `meta`; images assigned by earlier calls stay, unless `meta` changed since. Those that another process wrote with the same `meta`
        meanwhile stay, too.

        Args:
            part: Rank and number of processes that share the work: this one's assignments go to a file of their own, for `merge`.

        Raises:
            OSError: the disk is full; the earlier index is whole.
        """
        self.meta = json.loads(json.dumps(self.meta, default=str))
        now = json.dumps(self.meta, sort_keys=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        if part is not None:
            self._write(self.folder / _part(*part), self._fresh)
            return
        with _alone(self.folder):
            stored = _read_index(self.folder / INDEX)
            self._format = max(self._format, stored.get("format", _FORMAT))
            if stored and json.dumps(stored["meta"], sort_keys=True) == now:
                self._keys = {**self._keys, **stored["regions"]} if now == self._meta_before else dict(stored["regions"])
            elif now != self._meta_before:
                self._keys = {}
            self._keys.update(self._fresh)
            self._meta_before = now
            self._write(self.folder / INDEX, self._keys)

    def _write(self, path: Path, keys: dict[str, str]) -> None:
        text = json.dumps({"format": self._format, "meta": self.meta, "regions": dict(sorted(keys.items()))}, indent=1)
        blob.write_bytes(path, text.encode())

    def drop_part(self, part: tuple[int, int]) -> None:
        """Remove the file that `save` wrote for a rank in an earlier run."""
        (self.folder / _part(*part)).unlink(missing_ok=True)

    def merge(self, size: int) -> None:
        """Join the parts of `size` processes into the index, and remove all parts.

        Raises:
            DataError: a part is damaged.
            OSError: the disk is full; the earlier index is whole.
        """
        parts = [stored for rank in range(size) if (stored := _read_index(self.folder / _part(rank, size)))]
        for stored in parts:
            self.meta = dict(stored["meta"])
            self._fresh.update(stored["regions"])
            self._format = max(self._format, stored["format"])
        if parts:
            self.save()
        for path in self.folder.glob("part-*.json"):
            if self.is_part(path):
                path.unlink(missing_ok=True)

    def sweep(self, older_than: float = 3600) -> None:
        """Remove what killed processes left half written; never seen by readers.

        Args:
            older_than: Seconds; younger files may be in the making.
        """
        limit = time.time() - older_than
        for path in self.folder.glob("??/.*.tmp"):
            try:
                if path.stat().st_mtime < limit:
                    path.unlink()
            except OSError:  # another process was here first
                continue

    @staticmethod
    def is_part(path: Path) -> bool:
        """Whether a file is a part of an index, or what a killed process left of an index or part."""
        return bool(_PART.fullmatch(path.name))

    def region(self, record: Record | int, settings: ReadSettings | None = None) -> Tensor | None:
        """The region of an image, or None where it has none. float32 [H, W]

        Raises:
            DataError: its file is gone or damaged.
        """
        identity = record if isinstance(record, int) else record.id
        key = self._fresh.get(f"{identity:08x}") or self._keys.get(f"{identity:08x}")
        if key is None:
            return None
        try:
            return self.get(key)
        except KeyError as error:
            raise DataError(f"regions: the region {key} in {self.folder.name} must be there and whole, but is not. Run the same mwm localize again: "
                            "it makes only what is missing.") from error

    def has(self, record: Record) -> bool:
        """Whether an image has a region."""
        return record.hashed in self._fresh or record.hashed in self._keys

    def __len__(self) -> int:
        return len({**self._keys, **self._fresh})

    @property
    def read(self) -> ReadSettings | None:
        """How the images were read that these regions were made from; None where not noted."""
        stored = self.meta.get("read")
        return ReadSettings.from_dict(stored) if isinstance(stored, Mapping) else None

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.region"


class RegionStore(Protocol):
    """Where a data set finds regions."""

    def has(self, record: Record) -> bool:
        """Whether an image has a region."""
        ...

    def region(self, record: Record, settings: ReadSettings) -> Tensor | None:
        """The region of an image, of the image's own shape or that of `read.size`; None where there is none. float32 [H, W]"""
        ...


class RegionMaps:
    """Regions in memory, by image id.

    Args:
        maps: id → float [H, W] in [0, 1].
    """

    def __init__(self, maps: Mapping[int, Tensor]) -> None:
        self.maps = dict(maps)

    def has(self, record: Record) -> bool:
        """Whether an image has a map."""
        return record.id in self.maps

    def region(self, record: Record, settings: ReadSettings) -> Tensor | None:
        """The map of an image, or None."""
        found = self.maps.get(record.id)
        return None if found is None else torch.as_tensor(found, dtype=torch.float32)


class MaskColumn:
    """The masks that an index CSV names in its column `mask`."""

    def has(self, record: Record) -> bool:
        """Whether an image has a mask."""
        return record.mask is not None

    def region(self, record: Record, settings: ReadSettings) -> Tensor | None:
        """The mask of an image, or None."""
        return None if record.mask is None else read_record_mask(record.mask, record, settings)


def open_regions(regions: str | Path | RegionStore | Mapping[int, Tensor]) -> RegionStore:
    """What `--regions` names: a folder made by `mwm localize`, a folder of masks named like the images, or "masks" for the column `mask` of the CSV.

    Raises:
        DataError: it is none of these.
    """
    if isinstance(regions, Mapping):
        return RegionMaps(regions)
    if not isinstance(regions, (str, Path)):
        return regions
    folder = Path(regions).expanduser()
    if str(regions) == "masks" and not folder.exists():
        return MaskColumn()
    if (folder / INDEX).is_file():
        return RegionCache(folder)
    return MaskFolder(folder)


def warn_of_other_settings(store: RegionStore, settings: ReadSettings) -> list[str]:
    """Sentences on reading settings that differ from those the regions were made with; `size` and `aspect` do not matter to them."""
    made = getattr(store, "read", None)
    return [] if made is None else settings.differences(replace(made, size=settings.size, aspect=settings.aspect))


def _part(rank: int, size: int) -> str:
    return f"part-{rank:04d}-of-{size:04d}.json"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Other processes of this machine that write the index of the folder wait; where folders cannot be locked nobody does."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    damaged = f"regions: {path.name} in {path.parent.name} is damaged. Remove it and run mwm localize again: the regions themselves are kept."
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise ValueError("it is too large")
        stored = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(damaged) from error
    if not isinstance(stored, dict) or stored.get("format") not in (_FORMAT, _WITH_GRIDS):
        raise DataError(f"regions: {path.name} in {path.parent.name} was not written by this version. Remove the folder and run mwm localize again.")
    meta, keys = stored.setdefault("meta", {}), stored.setdefault("regions", {})
    # A key is part of a path: nothing but a hash may stand there.
    if not isinstance(meta, dict) or not isinstance(keys, dict) or not all(_ID.fullmatch(name) and isinstance(key, str) and _KEY.fullmatch(key) for name, key in keys.items()):
        raise DataError(damaged)
    return stored
