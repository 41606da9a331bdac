"""Several processes, as torchrun starts them, that share the images of one folder and write one index."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_PATIENCE = timedelta(days=7)  # shares take unequal time; torchrun itself ends all when one fails


@dataclass(frozen=True)
class Ranks:
    """Which process this is.

    Attributes:
        rank: Number of this process.
        size: How many there are.
        owns_group: Whether `leave` ends the process group.
    """

    rank: int = 0
    size: int = 1
    owns_group: bool = False

    @classmethod
    def join(cls) -> Ranks:
        """Join the processes that torchrun started, over gloo on the CPU, or be the only one.

        Raises:
            ValueError: torchrun's variables are incomplete.
        """
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(f"localize: WORLD_SIZE is {size}, but {', '.join(missing)} is not set. Start the processes with torchrun.")
        dist.init_process_group("gloo", timeout=_PATIENCE)
        return cls(dist.get_rank(), size, owns_group=True)

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes the index."""
        return self.rank == 0

    def share(self, items: list[Any]) -> list[Any]:
        """Every size-th item, from the rank-th on: sizes and slow files spread evenly."""
        return items[self.rank :: self.size]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on each of them; waits for all."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def leave(self) -> None:
        """Leave the process group that `join` made."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()
