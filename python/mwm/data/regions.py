"""Regions on disk: a content-keyed cache without names, and a reader of masks that the user already has."""

from __future__ import annotations

import json
import os
import secrets
import struct
import zlib
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mwm.data.errors import DataError
from mwm.data.image import kind_of, read_mask
from mwm.data.records import Record

_INDEX = "regions.json"
_MAGIC = b"MWMR"
_HEADER = struct.Struct("<4sHHII")  # magic, version, bits, height, width; then the deflated pixels and their CRC-32
_MAX_EDGE = 1 << 16


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is either whole or not there: temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class RegionCache:
    """Regions keyed by the content of image, prompt and settings; file names are hashes only.

    Args:
        folder: made on the first `put`.

    Attributes:
        meta: plain values stored beside the regions (prompt, localizer, settings).

    Raises:
        DataError: the folder's index is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.meta: dict[str, Any] = {}
        self._keys: dict[int, str] = {}
        index = self.folder / _INDEX
        if index.is_file():
            try:
                stored = json.loads(index.read_text())
                self.meta = dict(stored["meta"])
                self._keys = {int(identity, 16): str(key) for identity, key in stored["regions"].items()}
                damaged = any(len(key) != 40 or not set(key) <= set("0123456789abcdef") for key in self._keys.values())
            except (ValueError, KeyError, TypeError, AttributeError, OSError):
                damaged = True
            if damaged:
                raise DataError(f"regions: {_INDEX} in {self.folder.name} is damaged. Delete that file and localize again; finished maps are kept.")

    @staticmethod
    def key(*parts: str | bytes) -> str:
        """Hash of what a region depends on. 40 hexadecimal digits"""
        digest = blake2b(digest_size=20)
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            digest.update(struct.pack("<Q", len(data)))
            digest.update(data)
        return digest.hexdigest()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.region"

    def __contains__(self, key: str) -> bool:
        try:
            self.get(key)
        except (DataError, OSError):
            return False
        return True

    def __len__(self) -> int:
        return len(self._keys)

    def put(self, key: str, region: Tensor) -> None:
        """Store a region, rounded to 8 bits, atomically. float [H, W] in [0, 1]"""
        if region.ndim != 2 or not bool(torch.isfinite(region).all()):
            raise DataError(f"regions: region must be finite and [H, W], got {list(region.shape)}.")
        levels = (region.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().contiguous()
        pixels = levels.numpy().tobytes()
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = _HEADER.pack(_MAGIC, 1, 8, *levels.shape)
        write_atomic(path, header + zlib.compress(pixels, 3) + struct.pack("<I", zlib.crc32(pixels)))

    def get(self, key: str) -> Tensor:
        """Read a region. float32 [H, W]

        Raises:
            DataError: damaged. OSError: not there.
        """
        data = self._path(key).read_bytes()
        try:
            magic, version, bits, height, width = _HEADER.unpack_from(data)
            if (magic, version, bits) != (_MAGIC, 1, 8) or not (0 < height < _MAX_EDGE and 0 < width < _MAX_EDGE):
                raise ValueError("header")
            inflate = zlib.decompressobj()
            pixels = inflate.decompress(data[_HEADER.size : -4], height * width)
            if len(pixels) != height * width or zlib.crc32(pixels) != struct.unpack("<I", data[-4:])[0]:
                raise ValueError("content")
        except (ValueError, struct.error, zlib.error) as error:
            raise DataError(f"regions: map {key[:8]} in {self.folder.name} is damaged. Localize again; only this map is recomputed.") from error
        return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(height, width).float().div_(255)

    def assign(self, record_id: int, key: str) -> None:
        """Say which region belongs to an image."""
        self._keys[int(record_id)] = key

    def save(self) -> None:
        """Write the index atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        regions = {f"{identity:08x}": key for identity, key in sorted(self._keys.items())}
        write_atomic(self.folder / _INDEX, (json.dumps({"meta": self.meta, "regions": regions}, indent=1) + "\n").encode())

    def region(self, record: int | Record) -> Tensor:
        """The region of an image. float32 [H, W]

        Raises:
            DataError: there is none.
        """
        identity = record if isinstance(record, int) else record.id
        if identity not in self._keys:
            raise DataError(f"regions: image {identity:08x} has no region in {self.folder.name}. Localize the same list of images first.")
        try:
            return self.get(self._keys[identity])
        except OSError as error:
            raise DataError(f"regions: the map of image {identity:08x} is missing in {self.folder.name}. Localize again.") from error


class MaskFolder:
    """Masks that the user already has, found by the image's name.

    Looked for in this order: the same relative name, the same stem, the stem with _mask, -mask, _seg or -seg, first with
    the image's folder, then without; a slice of a volume takes the same slice of its mask.

    Args:
        folder: of the masks; None takes the `mask` column of the list.
    """

    ENDINGS = ("", "_mask", "-mask", "_seg", "-seg")

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()
        self._stems: dict[str, list[Path]] = {}
        if self.folder is None:
            return
        if not self.folder.is_dir():
            raise DataError(f"regions: there is no folder {folder}. Make regions with `mwm localize`, or give a folder of masks.")
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and kind_of(path):
                self._stems.setdefault(stem(path.relative_to(self.folder).as_posix()), []).append(path)
        if not self._stems:
            raise DataError(f"regions: folder {folder} holds neither regions nor masks. Make regions with `mwm localize`.")

    def find(self, record: Record) -> Path:
        """The mask of an image.

        Raises:
            DataError: there is none, or more than one.
        """
        if self.folder is not None:
            key = stem(record.name.split("#")[0])
            for candidate in [key + e for e in self.ENDINGS] + [key.rsplit("/", 1)[-1] + e for e in self.ENDINGS]:
                found = self._stems.get(candidate, [])
                if len(found) > 1:
                    raise DataError(f"regions: {record.name} must have one mask, got {len(found)} of the same stem. Remove all but one.")
                if found:
                    return found[0]
        if record.mask is None:
            raise DataError(f"regions: there is no mask for {record.name}. Add one of the same name, or leave the image out of the list.")
        return record.mask

    def region(self, record: Record) -> Tensor:
        """The mask as a region. float32 [H, W] in [0, 1]"""
        return read_mask(self.find(record), frame=record.frame)


def open_regions(folder: str | Path) -> RegionCache | MaskFolder:
    """Regions made by `mwm localize`, or a folder of masks; "masks" stands for the `mask` column of the index CSV."""
    if str(folder) == "masks" and not Path(folder).is_dir():
        return MaskFolder(None)
    return RegionCache(folder) if (Path(folder).expanduser() / _INDEX).is_file() else MaskFolder(folder)


def stem(name: str) -> str:
    """A relative name without the suffixes of its file type."""
    return name[: -len(".nii.gz")] if name.lower().endswith(".nii.gz") else name.rsplit(".", 1)[0] if "." in name.rsplit("/", 1)[-1] else name


Regions = RegionCache | MaskFolder
Records = Sequence[Record]
