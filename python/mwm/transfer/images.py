"""Labelled images, decoded once and kept on the device that trains on them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mwm.data import ReadSettings, SkippedFiles, UnreadableImage, read_image
from mwm.data.ram import available_bytes
from mwm.train.export import Preprocessing
from mwm.transfer.augment import Augment, warp
from mwm.transfer.config import TransferError
from mwm.transfer.labelled import Case

LEVELS = 32767
"""Decoded images are int16 in 0 … LEVELS: more than 8 bits stay, at half the memory of float32."""


def threads(workers: int) -> int:
    """Threads that read images: `workers`, or one per usable CPU, at most 8."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return workers or min(8, usable)


def refuse_beyond_memory(count: int, preprocessing: Preprocessing, *, labels: bool = False) -> None:
    """Refuse more images than fit into memory once they are decoded, before the first is read.

    Args:
        count: Images.
        preprocessing: Of the run.
        labels: Whether a label per pixel is kept beside them.

    Raises:
        TransferError: with what they take and what is free.
    """
    size, free = (2 * preprocessing.channels + labels) * count * preprocessing.size[0] * preprocessing.size[1], available_bytes()
    if free is not None and size > free:
        raise TransferError(f"finetune: the {count} decoded images must fit into memory, got {size / 2**30:.1f} GiB with {free / 2**30:.1f} GiB free. Take fewer, "
                            "or an encoder of smaller images.")


def decode_cases(cases: Sequence[Case], preprocessing: Preprocessing, *, strict: bool = False, progress: bool = False,
                 workers: int = 0) -> tuple[dict[str, Tensor], SkippedFiles]:
    """Decode all images once, at the run's size and intensities, in threads.

    Args:
        cases: What to read.
        preprocessing: Of the run.
        strict: Raise at an unreadable file instead of leaving it out.
        progress: Show a bar.
        workers: Threads; 0 = one per CPU, at most 8.

    Returns:
        Images by relative name, int16 [C, H, W] in 0 … LEVELS, and the files that cannot be read.

    Raises:
        UnreadableImage: with `strict`.
        TransferError: the decoded images do not fit into memory.
    """
    settings = replace(ReadSettings.from_dict(preprocessing.read), size=tuple(preprocessing.size))
    refuse_beyond_memory(len(cases), preprocessing)

    def read(case: Case) -> Tensor | UnreadableImage:
        try:
            image = read_image(case.record, settings, channels=preprocessing.channels)
        except UnreadableImage as error:
            return error
        return (image.clamp(0, 1) * LEVELS).round().to(torch.int16)

    images, skipped = {}, SkippedFiles()
    with ThreadPoolExecutor(threads(workers)) as pool:
        for case, result in zip(cases, tqdm(pool.map(read, cases), total=len(cases), desc="reading", unit="image", leave=False, disable=not progress), strict=True):
            if isinstance(result, Tensor):
                images[case.record.name] = result
            elif strict:
                pool.shutdown(cancel_futures=True)
                raise result
            else:
                skipped.add(case.record.name, str(result))
    return images, skipped


class CaseImages:
    """Normalised images of cases, from one int16 tensor that lies on the device, or on the host where it does not fit there.

    Args:
        cases: What to give out.
        decoded: From `decode_cases`.
        preprocessing: Of the run.
        device: Where batches are wanted.

    Attributes:
        labels: int64 [N], on the device.
        ids: Ids of the images. int64 [N], on the CPU
    """

    def __init__(self, cases: Sequence[Case], decoded: dict[str, Tensor], preprocessing: Preprocessing, device: torch.device | str = "cpu") -> None:
        self.cases, self.preprocessing, self.device = list(cases), preprocessing, torch.device(device)
        shape = (0, preprocessing.channels, *preprocessing.size)
        self.pixels = _placed(torch.stack([decoded[case.record.name] for case in self.cases]) if self.cases else torch.empty(shape, dtype=torch.int16), self.device)
        self.labels = torch.tensor([case.label for case in self.cases], dtype=torch.int64, device=self.device)
        self.ids = torch.tensor([case.record.id for case in self.cases], dtype=torch.int64)
        # Made once: a tensor from host numbers makes the host wait for the device, which must not happen in every step.
        self._scale = (LEVELS * torch.tensor(preprocessing.std, dtype=torch.float32)).view(-1, 1, 1).to(self.device)
        self._shift = (LEVELS * torch.tensor(preprocessing.mean, dtype=torch.float32)).view(-1, 1, 1).to(self.device)

    def __len__(self) -> int:
        return len(self.cases)

    def take(self, rows: Tensor, theta: Tensor | None = None) -> Tensor:
        """Images of some rows, moved by theta where given, then normalised.

        Args:
            rows: int64 [B], on the device of `pixels`
            theta: From `Augment.theta`. float32 [B, 2, 3], on the device

        Returns:
            channels last. float32 [B, C, H, W]
        """
        images = self.pixels[rows].to(self.device, non_blocking=True).float()
        if theta is not None:
            images = warp(images, theta)
        return ((images - self._shift) / self._scale).contiguous(memory_format=torch.channels_last)

    def batches(self, size: int, *, rows: Sequence[int] | np.ndarray | None = None, augment: Augment | None = None,
                epoch: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of (images float32 [B, C, H, W], labels int64 [B], rows int64 [B]) in the order of `rows`, else as listed.

        Everything but the pixels is computed for the whole epoch at once, so that the device never waits for the host.
        """
        order = torch.arange(len(self)) if rows is None else torch.as_tensor(np.asarray(rows), dtype=torch.int64)
        theta = augment.theta(epoch, self.ids[order]).to(self.device) if augment is not None and augment.moves else None
        labels, there = self.labels[order.to(self.device)], order.to(self.pixels.device)
        for k in range(0, len(order), size):
            part = slice(k, k + size)
            yield self.take(there[part], None if theta is None else theta[part]), labels[part], there[part]


def epoch_rows(count: int, size: int, *, seed: int, epoch: int) -> np.ndarray:
    """Rows of one training epoch in full batches; what is left over is dropped, another rest each time: batch norm needs full batches.

    A pure function of its arguments. int64 [count // size * size]
    """
    return np.random.default_rng([seed, epoch]).permutation(count)[: count // size * size]


def step_size(count: int, batch_size: int) -> int:
    """Images per step: `batch_size`, but at most an eighth of the images and at least 8 of them, so that a few labels still make many steps."""
    return min(count, batch_size, max(8, count // 8))


def _placed(pixels: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, or pinned on the host where it would take more than half of the free memory there."""
    if device.type != "cuda":
        return pixels
    free, _ = torch.cuda.mem_get_info(device)
    return pixels.to(device) if pixels.numel() * pixels.element_size() < free // 2 else pixels.pin_memory()
