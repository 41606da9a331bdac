"""One pass over the images: which can be read, and their mean and standard deviation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .dataset import PretrainDataset
from .errors import DataError, UnreadableImage
from .records import Record
from .settings import ReadSettings
from .skipped import SkippedFiles

_STEPS = 65535


def scan(records: Sequence[Record], settings: ReadSettings | None = None, *, channels: int | None = None, workers: int = 0, strict: bool = False,
         progress: bool = False) -> tuple[list[Record], SkippedFiles]:
    """Decode every image once, so that unreadable ones are known before training and no batch changes its size.

    Args:
        records: The list.
        settings: How images are read.
        channels: As in `PretrainDataset`.
        workers: Loader processes.
        strict: Raise for the first unreadable file instead of listing it.
        progress: Show a bar.

    Returns:
        The readable records in their order, and the others with reasons.

    Raises:
        UnreadableImage: under `strict`.
        DataError: none can be read.
    """
    kept, skipped = [], SkippedFiles()
    looks = DataLoader(_Looks(PretrainDataset(records, settings, channels=channels)), batch_size=None, num_workers=workers)
    for record, (reason, _, _, _) in zip(records, tqdm(looks, total=len(records), desc="reading images", unit="img", disable=not progress), strict=True):
        if reason is None:
            kept.append(record)
        elif strict:
            raise UnreadableImage(reason)
        else:
            skipped.add(record.name, reason)
    if records and not kept:
        raise DataError(f"images: at least one of the {len(records)} files must be readable, got none. The first: {skipped.rows[0][1]}")
    return kept, skipped


def image_statistics(dataset: PretrainDataset, *, workers: int = 0, progress: bool = False) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel over all pixels of all images, on values in [0, 1]; from exact integer sums, so that neither order nor worker count matters.

    Args:
        dataset: Without a transform; all its images readable.
        workers: Loader processes.
        progress: Show a bar.

    Raises:
        DataError: there are no images, or they differ in channels.
    """
    looks = DataLoader(_Looks(dataset), batch_size=None, num_workers=workers)
    totals: list[int] = []
    squares: list[int] = []
    pixels = 0
    for reason, total, square, count in tqdm(looks, total=len(dataset), desc="statistics", unit="img", disable=not progress):
        if reason is not None:
            raise DataError(reason)
        if totals and len(totals) != len(total):
            raise DataError(f"images: all must have the same channels, got {len(totals)} and {len(total)}. Set channels.")
        totals = [a + b for a, b in zip(totals or [0] * len(total), total, strict=True)]
        squares = [a + b for a, b in zip(squares or [0] * len(square), square, strict=True)]
        pixels += count
    if not pixels:
        raise DataError("images: statistics need at least one image, got none.")
    mean = tuple(total / (pixels * _STEPS) for total in totals)
    # The variance of integers is exact: n Σx² - (Σx)² in Python integers, divided once.
    std = tuple(((pixels * square - total * total) / (pixels * pixels)) ** 0.5 / _STEPS for total, square in zip(totals, squares, strict=True))
    return mean, std


class _Looks(Dataset):
    """Per image: why it cannot be read, or None; integer sums of its values and squares per channel; pixels."""

    def __init__(self, source: PretrainDataset) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[str | None, list[int], list[int], int]:
        try:
            image: Tensor = self.source[index]["image"]
        except UnreadableImage as error:
            return str(error), [], [], 0
        values = (image.double() * _STEPS).round().to(torch.int64)
        return None, values.sum((1, 2)).tolist(), values.square().sum((1, 2)).tolist(), image[0].numel()
