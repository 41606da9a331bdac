"""What a list of images is made of, and the ids that masks, crops and caches are keyed by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload


@dataclass(frozen=True)
class Record:
    """One image of a list: a file, or one slice or frame of it.

    Attributes:
        path: The file.
        name: Path relative to IMAGES with forward slashes, with "#z12" (slice), "#f3" (frame) or "#z12t0" (slice of a 4-D volume) behind
            it where the file holds several images. For terminal and local CSVs only.
        id: 32 bits of BLAKE2b of `name`; see `assign_ids`.
        split: Column of the index CSV, or None.
        label: Column of the index CSV, or None.
        patient: Column of the index CSV, or None.
        mask: File of the region's mask, or None.
        boxes: Boxes of the index CSV: dicts with `label` and `bbox_xyxy`, pixels of the stored image.
        prompt: Column of the index CSV, or None.
        frame: What follows "#" in `name`, or None.
    """

    path: Path
    name: str
    id: int
    split: str | None = None
    label: str | None = None
    patient: str | None = None
    mask: Path | None = None
    boxes: tuple[dict[str, Any], ...] = ()
    prompt: str | None = None
    frame: str | None = None

    @property
    def hashed(self) -> str:
        """The id in eight hexadecimal digits: the name of the image in logs, trackers, caches and shared figures."""
        return f"{self.id:08x}"


class ImageList(Sequence[Record]):
    """An immutable list of records.

    Args:
        records: The images, in the order that seeds refer to.
        root: Folder that names are relative to.
    """

    def __init__(self, records: Iterable[Record], root: Path) -> None:
        self._records, self.root = tuple(records), root

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> ImageList: ...
    def __getitem__(self, index: int | slice) -> Record | ImageList:
        return ImageList(self._records[index], self.root) if isinstance(index, slice) else self._records[index]

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __repr__(self) -> str:
        return f"ImageList({len(self)} images)"


def image_id(name: str) -> int:
    """BLAKE2b of a name in UTF-8 with a digest of 4 bytes, big-endian: an integer in [0, 2³²)."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=4).digest(), "big")


def assign_ids(records: Iterable[Record]) -> list[Record]:
    """Set the ids: `image_id(name)`, made unique.

    Of several names with one id (likely from about 80 000 images on), the first in the order of names keeps it; the
    others take `image_id(name + "\\0" + k)` with the smallest k = 1, 2, … that no other image of the list has. So an
    image's id depends on other images of the list only where two collide.

    Args:
        records: Records with different names; their ids are not looked at.

    Returns:
        The records in the given order, with ids.
    """
    records = list(records)
    holders: dict[int, list[int]] = {}
    for index, record in enumerate(records):
        holders.setdefault(image_id(record.name), []).append(index)
    ids: dict[int, int] = {}
    again: list[int] = []
    for value, indices in holders.items():
        first, *rest = sorted(indices, key=lambda index: records[index].name)
        ids[first] = value
        again += rest
    taken = set(holders)
    for index in sorted(again, key=lambda index: records[index].name):
        k = 1
        while (value := image_id(f"{records[index].name}\0{k}")) in taken:
            k += 1
        taken.add(value)
        ids[index] = value
    return [replace(record, id=ids[index]) for index, record in enumerate(records)]
