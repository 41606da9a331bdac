"""The order of an epoch: a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from mwm.ops import random_words

from .errors import DataError

STREAM = 33
"""Stream of the random words for the order."""


class EpochSampler(Sampler):
    """Indices of one epoch in random order.

    The order sorts the indices by 64-bit keys drawn for (seed, index, epoch), ties by index. Process r of `world_size` takes
    every `world_size`-th index from r on; the n mod `world_size` last ones of the order are dropped (others in each epoch), so
    that all processes have equally many; nothing is padded or drawn twice.

    Args:
        n: Images.
        seed: In [0, 2⁶⁴).
        epoch: From 0.
        start: Indices of this process that are done already.
        rank: Of this process.
        world_size: Number of processes.
        keyed: Give (epoch, index), the keys of a `PretrainDataset`, instead of indices.

    Raises:
        DataError: a number is out of its range.
    """

    def __init__(self, n: int, seed: int, epoch: int, start: int = 0, rank: int = 0, world_size: int = 1, *, keyed: bool = False) -> None:
        if n < 0 or world_size < 1 or not 0 <= rank < world_size or start < 0:
            raise DataError(f"sampler: n, start, rank, world_size must be counts with rank below world_size, got {n}, {start}, {rank}, {world_size}.")
        self.n, self.seed, self.epoch, self.start, self.rank, self.world_size, self.keyed = n, seed, epoch, start, rank, world_size, keyed

    def order(self) -> list[int]:
        """The whole epoch's order, of all processes."""
        words = random_words(self.seed, torch.arange(self.n), self.epoch, 0, STREAM, 2)
        # Stable sorts, the less significant word first, order 64-bit keys that would not fit a signed integer.
        second = torch.argsort(words[:, 1], stable=True)
        return second[torch.argsort(words[second, 0], stable=True)].tolist()

    def __len__(self) -> int:
        return max(0, self.n // self.world_size - self.start)

    def __iter__(self) -> Iterator[int] | Iterator[tuple[int, int]]:
        whole = self.n - self.n % self.world_size
        for index in self.order()[self.rank : whole : self.world_size][self.start :]:
            yield (self.epoch, index) if self.keyed else index
