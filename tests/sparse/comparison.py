"""A sparsified net against the oracle: outputs at visible positions, gradients, running statistics."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import MaskMultiply
from torch import Tensor, nn

import mwm


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give vectors (gammas, biases, layer scales, running statistics) random values: zeros would hide whole branches."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor, low: float, high: float) -> Tensor:
        return torch.empty(like.shape, dtype=torch.float64).uniform_(low, high, generator=generator).to(like.dtype)

    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            if not value.is_floating_point() or (value.dim() > 1 and value.abs().max() > 1e-3):
                continue
            if name.endswith("running_mean") or name.endswith("bias"):
                value.copy_(noise(value, -0.2, 0.2))
            elif value.numel() > 0 and "filt" not in name:
                value.copy_(noise(value, 0.5, 1.5))
    return net


def some_mask(batch: int, rows: int, columns: int, seed: int = 0) -> Tensor:
    """A mask with images of different counts, at least one visible patch in all but none forced elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(batch, rows, columns, generator=generator) < 0.5
    active[0, 0, 0] = active[-1, -1, -1] = True
    active[0, -1, 0] = False
    return active


def maps_of(out: Any) -> list:
    """The outputs as a list."""
    if isinstance(out, dict):
        return list(out.values())
    return list(out) if isinstance(out, list | tuple) else [out]


@dataclass
class Difference:
    """Largest relative differences: of outputs, gradients of parameters, buffers, and the gradient that reached hidden pixels."""

    outputs: float = 0.0
    gradients: float = 0.0
    buffers: float = 0.0
    hidden: float = 0.0
    maps: int = 0
    where: list[str] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """The largest of all."""
        return max(self.outputs, self.gradients, self.buffers, self.hidden)


def _relative(ours: Tensor, theirs: Tensor, floor: float = 1e-3) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    if theirs.numel() == 0:
        return 0.0
    scale = max(theirs.abs().max().item(), floor)
    gap = (ours - theirs).abs().max().item()
    return gap / scale if gap == gap else float("inf")


def compare(net: nn.Module, active: Tensor, *, channels: int, patch: int = 32, train: bool = True, seed: int = 1, sparse: nn.Module | None = None,
            backward: bool = True) -> Difference:
    """Run both on noise in float64, forward and backward.

    Args:
        net: dense net; copied, unless it is in float64 already: then it shares its parameters with the sparse one, and its mode and buffers move.
        active: bool [B, Gh, Gw]
        channels: of the image.
        patch: edge of a patch in pixels.
        train: mode of the nets.
        sparse: the net to test, if not `mwm.sparsify` of a copy.
        backward: compare gradients, too.
    """
    own = any(p.dtype != torch.float64 for p in net.parameters()) or sparse is not None
    dense = (copy.deepcopy(net).double() if own else net).train(train)
    if sparse is None:
        # Large nets would not fit twice into memory; buffers are copied, since running statistics move.
        sparse = mwm.sparsify(copy.deepcopy(dense, {id(p): p for p in dense.parameters()})).train(train)
    generator = torch.Generator().manual_seed(seed)
    batch, rows, columns = active.shape
    images = torch.randn(batch, channels, rows * patch, columns * patch, generator=generator, dtype=torch.float64)
    mine, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    with torch.set_grad_enabled(backward):
        found = maps_of(sparse(mwm.pack(mine, active)))
    packed = [isinstance(a, mwm.Packed) for a in found]
    found = [a.unpack() if isinstance(a, mwm.Packed) else a for a in found]
    weights = [torch.randn(a.shape, generator=generator, dtype=torch.float64) for a in found]
    if backward:
        sum((a * weight).sum() for a, weight in zip(found, weights, strict=True)).backward()
    gradients = _taken(sparse)
    mode = MaskMultiply(active)
    with mode, torch.set_grad_enabled(backward):
        expected = maps_of(dense(theirs))
    result = Difference(maps=len(found))
    loss = 0.0
    for i, (a, b, weight) in enumerate(zip(found, expected, weights, strict=True)):
        if packed[i]:
            if not mode.is_map(b):
                b = b.permute(0, 3, 1, 2) if b.dim() == 4 else b
            b = b * mode.mask(*b.shape[2:])[:, None]
        gap = _relative(a, b)
        result.outputs = max(result.outputs, gap)
        if gap > 1e-8:
            result.where.append(f"output {i}: {gap:.1e}")
        loss = loss + (b * weight).sum()
    if backward:
        loss.backward()
    correct = _taken(dense)
    scale = max([1e-6, *(grad.abs().max().item() for grad in correct if grad is not None and grad.numel())])
    for (name, p), a, b in zip(sparse.named_parameters(), gradients, correct, strict=True):
        if a is None and b is None:
            continue
        gap = _relative(torch.zeros_like(p) if a is None else a, torch.zeros_like(p) if b is None else b, floor=1e-6 * scale)
        result.gradients = max(result.gradients, gap)
        if gap > 1e-7:
            result.where.append(f"gradient of {name}: {gap:.1e}")
    for (name, p), q in zip(sparse.named_buffers(), dense.buffers(), strict=True):
        gap = _relative(p.double(), q.double())
        result.buffers = max(result.buffers, gap)
        if gap > 1e-8:
            result.where.append(f"buffer {name}: {gap:.1e}")
    pixels = ~active.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None].expand_as(images)
    if mine.grad is not None:
        result.hidden = mine.grad[pixels].abs().max().item() if pixels.any() else 0.0
        gap = _relative(mine.grad, theirs.grad * ~pixels if theirs.grad is not None else mine.grad)
        result.gradients = max(result.gradients, gap)
        if gap > 1e-7:
            result.where.append(f"gradient of the image: {gap:.1e}")
    return result


def _taken(net: nn.Module) -> list[Tensor | None]:
    """The gradients of the parameters, which are left without."""
    gradients = [p.grad for p in net.parameters()]
    for p in net.parameters():
        p.grad = None
    return gradients
