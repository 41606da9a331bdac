"""The normalised input of a convolution, computed again in the backward pass instead of kept.

A batch norm keeps its input for its derivative, and the convolution after it would keep the norm's output for the derivative in the
filters: the same map twice. For large maps, reading one and applying scale, shift and ReLU again is worth the memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mwm.ops import batch_norm

# Smaller outputs are kept: what they would spare is little, and reading the map twice costs up to 5 % of a step (bench/NOTES.md).
LEAST_BYTES = 5 << 20
_NAME = "_mwm_norm"


class Recipe(NamedTuple):
    """How a norm's output is computed again: the arguments of `batch_norm`, and the versions they had."""

    x: Tensor
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    activation: str | None
    versions: tuple[int, ...]

    def tensors(self) -> list[Tensor]:
        """The arguments that are tensors."""
        return [tensor for tensor in self[:5] if tensor is not None]

    def compute(self) -> Tensor:
        """The output, bit for bit. [T, C, t, t]

        Raises:
            RuntimeError: an argument was written to since, which torch refuses for kept tensors too.
        """
        if self.versions != tuple(tensor._version for tensor in self.tensors()):
            raise RuntimeError("mwm: a batch norm's input, weight or bias was modified in place before the backward pass that needs it. "
                               "Run backward before the optimizer's step, or write to a copy.")
        with torch.no_grad():
            return batch_norm(*self[:5], eps=self.eps, activation=self.activation)


def remember(out: Tensor, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str | None) -> Tensor:
    """Note on a norm's output how it was computed; returns it."""
    if not x.requires_grad or out.untyped_storage().nbytes() < LEAST_BYTES:
        return out
    recipe = Recipe(x.detach(), mean, var, weight, bias, eps, activation, ())
    setattr(out, _NAME, (recipe._replace(versions=tuple(tensor._version for tensor in recipe.tensors())), out._version))
    return out


@contextlib.contextmanager
def spared(x: Tensor) -> Iterator[None]:
    """Inside, a graph that wants to keep `x`, the output of `remember`, or a view of it, keeps its recipe instead."""
    recipe, version = getattr(x, _NAME, (None, 0))
    if recipe is None or version != x._version or not torch.is_grad_enabled() or _occupied():
        yield
        return
    storage, dtype = x.untyped_storage().data_ptr(), x.dtype

    def pack(tensor: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...], int]:
        if tensor.dtype != dtype or tensor.layout != torch.strided or tensor.untyped_storage().data_ptr() != storage:
            return tensor
        return tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(kept: Tensor | tuple[torch.Size, tuple[int, ...], int]) -> Tensor:
        return kept if isinstance(kept, Tensor) else recipe.compute().as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _occupied() -> bool:
    """Whether hooks of the caller's, a transform or a compiler would not get along with ours."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
