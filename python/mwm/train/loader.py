"""Batches that are pure functions of (seed, epoch, step): order, crops, flips and masks, whatever the worker count."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mwm.data import EpochSampler
from mwm.masking import Policy, inside_grid, split_maps
from mwm.train.config import TrainError


class Batch(NamedTuple):
    """One step's share of one process.

    Attributes:
        images: normalised. float32 [B, C, H, W]
        active: True = visible. bool [B, Gh, Gw]
        ids: image ids. int64 [B]
        epoch: from 0.
        weight: how much a patch counts in the loss. float32 [B, Gh, Gw], or None: all alike
    """

    images: Tensor
    active: Tensor
    ids: Tensor
    epoch: int
    weight: Tensor | None = None


class MaskedViews(Dataset):
    """Augmented, normalised images with their masks; a key is (epoch, index).

    Args:
        source: `mwm.data.PretrainDataset` without a transform.
        transform: `mwm.data.JointTransform`.
        normalise: [C, H, W] -> [C, H, W], both float32.
        policy: draws the masks.
        grid: patches along height and width.
        seed: seed of the run.
        weigher: `RegionWeigher`, where patches inside the region count more or less in the loss.
    """

    def __init__(self, source: Dataset, transform: Callable, normalise: Callable[[Tensor], Tensor], policy: Policy, grid: tuple[int, int],
                 seed: int, weigher: RegionWeigher | None = None) -> None:
        self.source, self.transform, self.normalise = source, transform, normalise
        self.policy, self.grid, self.seed, self.weigher = policy, grid, seed, weigher

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int, int, Tensor | None]:
        epoch, index = key
        sample = self.source[index]
        identity = int(sample["id"])
        image, region = self.transform(sample["image"], sample["region"], seed=self.seed, id=identity, epoch=epoch, view=0)
        active = self.policy(region[None] if self.policy.needs_region else None, grid=self.grid, seed=self.seed, ids=torch.tensor([identity]), epoch=epoch)
        return self.normalise(image), active[0], identity, epoch, self.weigher(region[None])[0] if self.weigher else None


class RegionWeigher:
    """How much each patch counts in the loss: `weight` inside the region, 1 elsewhere.

    Args:
        weight: positive.
        grid: patches along height and width.
        min_cover: covered share from which a patch is region.
    """

    def __init__(self, weight: float, grid: tuple[int, int], min_cover: float) -> None:
        self.weight, self.grid, self.min_cover = weight, grid, min_cover

    def __call__(self, region: Tensor) -> Tensor:
        """float [B, H, W] or [B, 2, H, W] → float32 [B, Gh, Gw]"""
        inside, _ = inside_grid(split_maps(region)[0], self.grid, min_cover=self.min_cover, name="region_weight")
        return torch.where(inside, self.weight, 1.0).to(torch.float32)


class BatchOrder(Sampler):
    """The keys of every batch of one process, from a step on.

    Batch k of an epoch is rows [k·batch, (k + 1)·batch) of the epoch's order, of which process r takes its r-th equal
    part; so the joint batch does not depend on the number of processes. What is left over at an epoch's end is dropped
    (another rest in every epoch).

    Args:
        images: number of images.
        batch: images of a joint batch.
        seed: seed of the run.
        epochs: epochs of the run.
        start: optimizer steps done.
        rank, world_size: of the process.
    """

    def __init__(self, images: int, batch: int, *, seed: int, epochs: int, start: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.images, self.batch, self.seed, self.epochs, self.start = images, batch, seed, epochs, start
        self.rank, self.part = rank, batch // world_size
        self.per_epoch = images // batch

    def __len__(self) -> int:
        return self.epochs * self.per_epoch - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first, done = divmod(self.start, self.per_epoch)
        for epoch in range(first, self.epochs):
            order = list(EpochSampler(self.images, seed=self.seed, epoch=epoch))
            for k in range(done if epoch == first else 0, self.per_epoch):
                at = k * self.batch + self.rank * self.part
                yield [(epoch, index) for index in order[at : at + self.part]]


def joint_batch(images: int, batch_size: int, world_size: int) -> int:
    """Images of a joint batch: `batch_size`, or all of a smaller data set that divide among the processes.

    Raises:
        TrainError: the processes cannot share the batch equally.
    """
    if batch_size % world_size:
        raise TrainError(f"pretrain: batch_size must be a multiple of the {world_size} processes, got {batch_size}. Take "
                         f"{max(1, round(batch_size / world_size)) * world_size}.")
    if images < world_size:
        raise TrainError(f"pretrain: images must be at least one per process, got {images} for {world_size} processes. Start fewer processes.")
    return min(batch_size, images - images % world_size)


def create_loader(views: MaskedViews, order: BatchOrder, *, workers: int | None, device: torch.device) -> DataLoader:
    """A loader over all remaining steps of a run; its workers live as long as it does."""
    count = default_workers() if workers is None else workers
    return DataLoader(views, batch_sampler=order, num_workers=count, collate_fn=_collate, pin_memory=device.type == "cuda",
                      prefetch_factor=4 if count else None)


def default_workers() -> int:
    """One per spare CPU, at most 4."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(4, usable - 1))


def one_sentence(error: Exception) -> str:
    """The message of an error, without the traceback that a loader process wraps around it."""
    text = str(error).strip()
    return text.splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else text


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A small tensor on the device, without waiting for what the device does."""
    return x.to(device) if device.type != "cuda" or x.device.type == "cuda" else x.pin_memory().to(device, non_blocking=True)


def _collate(samples: list[Any]) -> Batch:
    images, active, ids, epochs, weights = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.stack(active), torch.tensor(ids, dtype=torch.int64), epochs[0], None if weights[0] is None else torch.stack(weights))
