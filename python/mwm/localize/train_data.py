"""Images with masks and prompts, or with captions, for training a localizer: listed, split by patient, read in threads."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mwm.data import DataError, MaskFolder, PretrainDataset, ReadSettings, Record, SkippedFiles, read_list
from mwm.data.regions import MaskColumn, RegionStore
from mwm.localize.stream import read_ahead

_MAX_CELL = 4 * 2**20
ABSENT = ("a person sitting on a chair", "a cat", "a red car", "a hand holding a cup", "trees beside a road")
"""Texts about what no medical image shows: with them the answer is to be empty, so that the text keeps a say."""


@dataclass(frozen=True)
class Examples:
    """What a training reads.

    Attributes:
        train: Images to learn from.
        val: Images that choose the best epoch; never those of a patient in `train`.
        texts: For each record id: its own texts; empty where the common ones apply.
    """

    train: list[Record]
    val: list[Record]
    texts: dict[int, list[str]]


def list_examples(
    images: str | Path, *, masks: RegionStore | None, caption: bool, split: str | None = None, root: str | Path | None = None, read: ReadSettings | None = None,
    val_share: float = 0.15, seed: int = 0
) -> Examples:
    """List the images, find their texts and part them.

    A split column with train and val decides (test rows are never read); else a share of the patients, or of the images where no patient is known, validates.

    Args:
        images: Folder, glob, text list or index CSV.
        masks: Where masks are found; images without one are left out. None where captions are learned from.
        caption: Take texts from the CSV's column `caption`, else `prompt`, and require them; else `prompt` alone, where there is one.
        split: Only this split of an index CSV, parted as if it had none.
        root: Folder that the CSV's paths start from.
        read: How volumes are sliced.
        val_share: Share that validates, in (0, 1).
        seed: Of that choice.

    Raises:
        ValueError: nothing is left to learn from or to validate on.
        DataError: the images cannot be listed.
    """
    records = list(read_list(images, split=split, root=root, settings=read or ReadSettings()))
    captions = _captions(Path(images).expanduser()) if caption else {}
    texts = {}
    for record in records:
        text = (captions.get(record.name.split("#")[0]) or record.prompt or "").strip()
        texts[record.id] = [text] if text else []
    if caption:
        kept = [record for record in records if texts[record.id]]
        if len(kept) < 4:
            raise ValueError(f"localize train: images must have captions, got {len(kept)} of {len(records)} with one. Give an index CSV with a column caption or prompt.")
    else:
        kept = [record for record in records if masks is not None and masks.has(record)]
        if len(kept) < 2:
            raise ValueError(f"localize train: images must have masks, got {len(kept)} of {len(records)} with one. "
                             "Name masks like their images, or fill the column mask of the CSV.")
    train, val = _part(kept, split, val_share, seed)
    if not train or not val:
        raise ValueError(f"localize train: images to learn from and to validate on must be there, got {len(train)} and {len(val)}. Give more patients, or another val share.")
    return Examples(train, val, texts)


def mask_store(masks: str | Path | None) -> RegionStore:
    """A folder of masks named like the images, or the column `mask` of the index CSV where none is given."""
    return MaskColumn() if masks is None else MaskFolder(masks)


def epoch_order(count: int, training: bool, seed: int, epoch: int) -> list[int]:
    """Places of the images in the order of an epoch: a function of seed and epoch; validation goes through the list."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist() if training else list(range(count))


def step_seed(seed: int, epoch: int, place: int) -> int:
    """Seed of what is drawn in the step at a place of an epoch, so that a step depends on none before it. [0, 2⁶³)"""
    return int.from_bytes(hashlib.blake2b(f"{seed} {epoch} {place}".encode(), digest_size=8).digest(), "little") >> 1


def read_batches(
    records: Sequence[Record], order: Sequence[int], batch_size: int, *, size: tuple[int, int], masks: RegionStore | None, read: ReadSettings, skipped: SkippedFiles,
    workers: int, begin: int = 0
) -> Iterator[tuple[Tensor, Tensor, list[Record], int]]:
    """Batches in an order; files that cannot be read are left out and noted.

    Args:
        records: The images.
        order: Places in `records`.
        batch_size: Images of a batch.
        size: Height and width of the model's input.
        masks: Where masks are found, or None.
        read: How images are read.
        skipped: Gets files that cannot be read.
        workers: Threads that read.
        begin: Where in `order` to begin; behind a batch, the same batches follow as without.

    Yields:
        images float32 [B, C, H, W] in [0, 1], masks float32 [B, H, W] in [0, 1], records, and the place in `order` behind the batch.
    """
    settings = ReadSettings(**{**read.to_dict(), "size": size, "aspect": "stretch"})  # localizers stretch to the model's square
    data = PretrainDataset(records, settings, masks, channels=3)
    waiting: list[tuple[Tensor, Tensor, Record]] = []
    place = begin
    with closing(read_ahead(order[begin:], lambda index: data[index], workers=workers, ahead=2 * batch_size)) as found:
        for index, item in found:
            place += 1
            if isinstance(item, (DataError, OSError)):
                skipped.add(records[index].name, str(item))
            elif isinstance(item, Exception):
                raise item
            else:
                waiting.append((item["image"], item["region"], records[index]))
            if waiting and (len(waiting) == batch_size or place == len(order)):
                yield torch.stack([one[0] for one in waiting]), torch.stack([one[1] for one in waiting]), [one[2] for one in waiting], place
                waiting = []


def _part(records: list[Record], split: str | None, val_share: float, seed: int) -> tuple[list[Record], list[Record]]:
    if split is None and any(record.split == "val" for record in records):
        return [r for r in records if r.split == "train"], [r for r in records if r.split == "val"]
    if split is None:
        records = [record for record in records if record.split != "test"]
    groups = sorted({record.patient or record.name for record in records})
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {groups[index] for index in order[: max(1, round(val_share * len(groups)))]}
    return [r for r in records if (r.patient or r.name) not in chosen], [r for r in records if (r.patient or r.name) in chosen]


def _captions(path: Path) -> dict[str, str]:
    """The column `caption` of an index CSV, by its column `file`; nothing where there is none."""
    path = path / "index.csv" if path.is_dir() else path
    if path.suffix.lower() != ".csv" or not path.is_file():
        return {}
    before = csv.field_size_limit(_MAX_CELL)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return {row["file"].split("#")[0]: row.get("caption") or "" for row in csv.DictReader(file) if row.get("file")}
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"images: {path.name} must be a CSV in UTF-8, but cannot be read ({error}).") from error
    finally:
        csv.field_size_limit(before)
