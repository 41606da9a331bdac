"""What the workers of test_threads.py run: a module of its own, so that a spawned process can import it by name."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from mwm import _core, ops


def draw(ids: torch.Tensor) -> torch.Tensor:
    """Masks of 49 patches in two strata. bool [B, 7, 7]"""
    strata = (torch.arange(49) % 2).expand(ids.shape[0], 49)
    return ops.sample_active(strata, ops.to_q32([0.4, 0.8]), grid=(7, 7), seed=0, ids=ids, epoch=0)


class Masks(Dataset):
    """Masks drawn where the loader runs; large enough for a parallel loop."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> torch.Tensor:
        torch.set_num_threads(self.threads)
        return draw(torch.arange(1000 * i, 1000 * i + 500))


def report_runtime(queue) -> None:
    """Put the thread runtime of this process into the queue, after it has drawn."""
    torch.set_num_threads(2)
    draw(torch.arange(2000))
    queue.put(_core.thread_runtime())
