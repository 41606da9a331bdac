"""The order of an epoch, a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from mwm.data.errors import DataError
from mwm.ops import random_words

STREAM = 33


class EpochSampler(Sampler[int]):
    """A permutation of 0 … n − 1 that depends on seed and epoch alone.

    Args:
        n: number of images.
        seed, epoch: what the order is a function of.
        start: positions of the joint order that are done already.
        rank, world_size: process r takes positions start + r, start + r + world_size, …; what does not divide among the
            processes is dropped at the end (another rest in every epoch).
    """

    def __init__(self, n: int, *, seed: int, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise DataError(f"sampler: rank must be in [0, {world_size}), got {rank}.")
        self.n, self.seed, self.epoch, self.start, self.rank, self.world_size = n, seed, epoch, start, rank, world_size

    def __len__(self) -> int:
        return max(0, self.n - self.start) // self.world_size

    def __iter__(self) -> Iterator[int]:
        if self.n == 0:
            return
        words = random_words(self.seed, torch.arange(self.n), self.epoch, 0, STREAM, 2)
        key = ((words[:, 0] & 0x7FFFFFFF) << 32) | words[:, 1]
        order = torch.argsort(key, stable=True).tolist()[self.start :]
        yield from order[self.rank : len(self) * self.world_size : self.world_size]
