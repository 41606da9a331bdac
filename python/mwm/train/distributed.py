"""One process; CORE replaces this file by the one for several (see the contract in the notes)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """The processes of a run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0


def start(device: str = "auto", backend: str | None = None) -> World:
    """The world of one process."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return World(0, 1, torch.device(device))


def stop(world: World) -> None:
    """Nothing to stop."""


def sync_batch_norm(module: nn.Module, world: World) -> nn.Module:
    """The module as it is."""
    return module


def wrap(module: nn.Module, world: World) -> nn.Module:
    """The module as it is."""
    return module


def sum_over_ranks(tensor: Tensor, world: World) -> Tensor:
    """The tensor as it is."""
    return tensor


def broadcast_object(value: Any, world: World) -> Any:
    """The value as it is."""
    return value


def barrier(world: World) -> None:
    """Nothing to wait for."""
