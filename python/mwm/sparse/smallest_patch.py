"""The smallest patch that every stride of a network divides, found by trying."""

from __future__ import annotations


def smallest_patch(reached: int) -> int:
    return reached
