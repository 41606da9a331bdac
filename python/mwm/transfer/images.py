"""Labelled images as batches, prepared as the pre-training run prepared its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mwm.data import ReadSettings, SkippedFiles, UnreadableImage, read_image
from mwm.train.export import Preprocessing
from mwm.transfer.labelled import Case

_LEVELS = 32767  # decoded images are kept as int16: more than 8 bits stay, at half the memory of float32


def decode_cases(cases: Sequence[Case], preprocessing: Preprocessing, *, strict: bool = False, progress: bool = False) -> tuple[dict[str, Tensor], SkippedFiles]:
    """Decode all images once, at the run's size and intensities.

    Args:
        cases: What to read.
        preprocessing: Of the run.
        strict: Raise at an unreadable file instead of leaving it out.
        progress: Show a bar.

    Returns:
        Images by relative name, int16 [C, H, W] in 0 … 32767, and the files that cannot be read.

    Raises:
        UnreadableImage: with `strict`.
    """
    settings = replace(ReadSettings.from_dict(preprocessing.read), size=tuple(preprocessing.size))
    images, skipped = {}, SkippedFiles()
    for case in tqdm(cases, desc="reading", unit="image", leave=False, disable=not progress):
        try:
            image = read_image(case.record, settings, channels=preprocessing.channels)
        except UnreadableImage as error:
            if strict:
                raise
            skipped.add(case.record.name, str(error))
            continue
        images[case.record.name] = (image.clamp(0, 1) * _LEVELS).round().to(torch.int16)
    return images, skipped


class CaseImages(Dataset):
    """Normalised images of cases; a crop and a flip are drawn from (seed, epoch, index).

    Args:
        cases: What to give out.
        decoded: From `decode_cases`.
        preprocessing: Of the run.
        crop: Least share of the area in a random crop; 1 = none.
        flip: Whether to flip half of the images left to right.
        seed: Of crops and flips.
    """

    def __init__(self, cases: Sequence[Case], decoded: dict[str, Tensor], preprocessing: Preprocessing, *, crop: float = 1.0, flip: bool = False,
                 seed: int = 0) -> None:
        self.cases, self.decoded, self.preprocessing = cases, decoded, preprocessing
        self.crop, self.flip, self.seed, self.epoch = crop, flip, seed, 0

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image = self.decoded[self.cases[index].record.name].float() / _LEVELS
        if self.crop < 1 or self.flip:
            image = self._augment(image, np.random.default_rng([self.seed, self.epoch, index]))
        return self.preprocessing.normalise(image), self.cases[index].label, index

    def _augment(self, image: Tensor, random: np.random.Generator) -> Tensor:
        height, width = image.shape[1:]
        side = np.sqrt(random.uniform(self.crop, 1))
        h, w = max(1, round(height * side)), max(1, round(width * side))
        top, left = int(random.integers(0, height - h + 1)), int(random.integers(0, width - w + 1))
        part = image[:, top : top + h, left : left + w]
        if self.flip and random.random() < 0.5:
            part = part.flip(-1)
        return F.interpolate(part[None], (height, width), mode="bilinear", align_corners=False)[0]


def batches(images: CaseImages, size: int, *, order: Sequence[int] | None = None, workers: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of (normalised images [B, C, H, W], labels int64 [B], indices int64 [B]) in the given order, else as listed."""
    rows = list(range(len(images))) if order is None else list(order)
    yield from DataLoader(images, batch_sampler=[rows[k : k + size] for k in range(0, len(rows), size)], num_workers=workers)
