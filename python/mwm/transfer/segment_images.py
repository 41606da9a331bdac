"""Images and masks side by side: decoded once, kept on the device, cropped and flipped together in whole batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mwm.data import ReadSettings, SkippedFiles, UnreadableImage
from mwm.data.image import decode
from mwm.train.export import Preprocessing
from mwm.transfer.augment import Augment, warp
from mwm.transfer.images import LEVELS, CaseImages, refuse_beyond_memory, threads
from mwm.transfer.labelled import Case
from mwm.transfer.placing import placing
from mwm.transfer.segment_masks import MaskClasses, read_truth

_SURE = 20.0  # logit of what is certain


@dataclass(frozen=True)
class Decoded:
    """One image as a network sees it, with its labels on the same pixels.

    Attributes:
        image: int16 [C, H, W] in 0 … LEVELS.
        labels: uint8 [H, W], nearest; None where only the image was asked for.
        stored: (height, width) of the stored image.
        spacing: Height and width of a stored pixel (mm for DICOM and NIfTI), or None where not known.
        lost: Whether the mask marks something, but on none of the network's pixels.
    """

    image: Tensor
    labels: Tensor | None
    stored: tuple[int, int]
    spacing: tuple[float, float] | None
    lost: bool = False


def read_settings(preprocessing: Preprocessing) -> ReadSettings:
    """How the images of a run are read, at its size."""
    return replace(ReadSettings.from_dict(preprocessing.read), size=tuple(preprocessing.size))


def decode_masked(cases: Sequence[Case], classes: MaskClasses | None, preprocessing: Preprocessing, *, strict: bool = False, workers: int = 0,
                  progress: bool = False) -> tuple[dict[str, Decoded], SkippedFiles]:
    """Decode images and masks once, at the run's size and intensities.

    Args:
        cases: What to read.
        classes: What the masks mean; None reads no masks.
        preprocessing: Of the run.
        strict: Raise at an unreadable file instead of leaving it out.
        workers: Threads; 0 = one per CPU, at most 8.
        progress: Show a bar.

    Returns:
        By relative name, and the files that cannot be read.

    Raises:
        UnreadableImage: with `strict`.
        TransferError: a mask does not fit its image, its values have no meaning, or all this does not fit into memory.
    """
    settings = read_settings(preprocessing)
    refuse_beyond_memory(len(cases), preprocessing, labels=classes is not None)

    def read(case: Case) -> Decoded | UnreadableImage:
        try:
            image, stored, spacing = decode(case.record, settings, channels=preprocessing.channels)
            truth = None if classes is None else read_truth(case, classes, stored, settings)
        except UnreadableImage as error:
            return error
        labels = None if truth is None else torch.from_numpy(to_model(truth, settings, spacing))
        lost = truth is not None and bool(truth.any()) and not bool(labels.any())
        return Decoded((image.clamp(0, 1) * LEVELS).round().to(torch.int16), labels, stored, spacing, lost)

    found, skipped = {}, SkippedFiles()
    with ThreadPoolExecutor(threads(workers)) as pool:
        results = pool.map(read, cases)
        for case, result in zip(cases, tqdm(results, total=len(cases), desc="reading", unit="image", leave=False, disable=not progress), strict=True):
            if isinstance(result, Decoded):
                found[case.record.name] = result
            elif strict:
                pool.shutdown(cancel_futures=True)
                raise result
            else:
                skipped.add(case.record.name, str(result))
    return found, skipped


def to_model(labels: NDArray, settings: ReadSettings, spacing: tuple[float, float] | None) -> NDArray:
    """Labels of the stored image on the pixels of the network's picture: the label of the nearest stored pixel, 0 beside the image.

    Args:
        labels: uint8 [h, w]
        settings: Of which `size` and `aspect` are used.
        spacing: Height and width of a stored pixel, or None.

    Returns:
        uint8 [*size]
    """
    place = placing(labels.shape, settings, spacing)
    rows, columns = (np.floor((np.arange(edge) + 0.5 - place.offset[axis]) / place.scale[axis]).astype(int) for axis, edge in enumerate(place.size))
    inside = ((rows >= 0) & (rows < labels.shape[0]))[:, None] & ((columns >= 0) & (columns < labels.shape[1]))[None]
    return np.where(inside, labels[rows.clip(0, labels.shape[0] - 1)][:, columns.clip(0, labels.shape[1] - 1)], 0).astype(labels.dtype)


def to_source(maps: Tensor, stored: tuple[int, int], settings: ReadSettings, spacing: tuple[float, float] | None, *, unseen: Tensor | None = None) -> Tensor:
    """Maps on the network's picture brought to the pixels of the stored image, bilinear.

    Args:
        maps: float [K, H, W]
        stored: (height, width) of the stored image.
        settings: Of which `size` and `aspect` are used.
        spacing: Height and width of a stored pixel, or None.
        unseen: Values where a centre crop has cut the image off; None: logits that say background (for K = 1: 0). [K]

    Returns:
        float [K, *stored]
    """
    place = placing(stored, settings, spacing)
    if tuple(maps.shape[-2:]) == tuple(stored) and place.scale == (1.0, 1.0) and place.offset == (0.0, 0.0):
        return maps
    y, x = (((torch.arange(edge, dtype=torch.float64) + 0.5) * place.scale[axis] + place.offset[axis]) * 2 / place.size[axis] - 1 for axis, edge in enumerate(stored))
    grid = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), -1)[None].to(maps.device, maps.dtype)
    result = F.grid_sample(maps[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]
    outside = (grid[0].abs() > 1).any(-1)
    if outside.any():
        if unseen is None:
            unseen = torch.full((len(maps),), -_SURE) if len(maps) > 1 else torch.zeros(1)
            unseen[0] *= -1
        result[:, outside] = unseen.to(result)[:, None]
    return result


class MaskedSet:
    """Images and labels of a split as two tensors on the device.

    Args:
        cases: In order.
        decoded: By relative name, with labels.
        preprocessing: Of the run.
        device: Where batches are wanted.

    Attributes:
        cases: As given.
        decoded: Of each case.
    """

    def __init__(self, cases: Sequence[Case], decoded: dict[str, Decoded], preprocessing: Preprocessing, device: torch.device) -> None:
        self.cases, self.decoded, self.device = list(cases), [decoded[case.record.name] for case in cases], device
        self.images = CaseImages(self.cases, {case.record.name: d.image for case, d in zip(self.cases, self.decoded, strict=True)}, preprocessing, device)
        self.labels = torch.stack([d.labels for d in self.decoded]).to(self.images.pixels.device)

    def __len__(self) -> int:
        return len(self.cases)

    def batches(self, size: int, *, rows: NDArray | None = None, augment: Augment | None = None, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels moved together, images bilinear, labels nearest, in the order of `rows`, else as listed.

        Args:
            size: Images of a batch; the last one may be smaller.
            rows: int64 [M]
            augment: Draws the moves from the ids of the images.
            epoch: From 0.

        Yields:
            Normalised images float32 [B, C, H, W], channels last, and labels int64 [B, H, W], on the device.
        """
        order = torch.arange(len(self)) if rows is None else torch.as_tensor(rows, dtype=torch.int64)
        theta = augment.theta(epoch, self.images.ids[order]).to(self.device) if augment is not None and augment.moves else None
        there = order.to(self.labels.device)
        for k in range(0, len(order), size):
            part, move = there[k : k + size], None if theta is None else theta[k : k + size]
            labels = self.labels[part].to(self.device, torch.float32)
            if move is not None:
                labels = warp(labels[:, None], move, mode="nearest")[:, 0]
            yield self.images.take(part, move), labels.long()
