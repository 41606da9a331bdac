"""One transformer block of a vision tower as plain weights, whatever library it came from, with gradients of activations only.

The library's own modules would do; but here the last block may be asked for one token, the weights never get a gradient, and linear layers go the way that is
fastest where they run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mwm.localize.frozen_linear import FrozenLinear, works

_QUICK_GELU, _QUICK = ("QuickGELUActivation", "QuickGELU"), 1.702

Norm = tuple[Tensor, Tensor, float]
"""Weight [D], bias [D] and epsilon of a layer norm."""


@dataclass
class Linear:
    """A linear layer of frozen weights.

    Attributes:
        weight: float [O, I]
        bias: float [O], or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O]"""
        return F.linear(x, self.weight, self.bias)

    def to(self, dtype: torch.dtype) -> Linear:
        """The layer in another precision."""
        return Linear(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def part(self, first: int, last: int) -> Linear:
        """Output channels first … last - 1."""
        return Linear(self.weight[first:last], None if self.bias is None else self.bias[first:last])


@dataclass
class Block:
    """x + a · attention(norm1(x)), then x + b · mlp(norm2(x)).

    Attributes:
        norm1: Before the attention.
        qkv: D → 3 D; queries, keys, values.
        out: After the attention.
        norm2: Before the MLP.
        up: Into the MLP.
        activation: Between.
        down: Out of the MLP.
        heads: Of the attention.
        scale1: Factors of the attention's branch [D], or None for 1.
        scale2: Factors of the MLP's branch [D], or None for 1.
    """

    norm1: Norm
    qkv: Linear | FrozenLinear
    out: Linear | FrozenLinear
    norm2: Norm
    up: Linear | FrozenLinear
    activation: Callable[[Tensor], Tensor]
    down: Linear | FrozenLinear
    heads: int
    scale1: Tensor | None = None
    scale2: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[N, T, D] → [N, T, D]"""
        n, t, d = x.shape
        q, k, v = self.qkv(_norm(x, self.norm1)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)
        return self._rest(x, mixed)

    def first_token(self, x: Tensor) -> Tensor:
        """What the block makes of the first token, at a hundredth of the work: keys and values of the others are never formed.

        q · (W_k x) = (W_kᵀ q) · x, and the mean of W_v x is W_v of the mean of x; the bias of the keys adds the same to every score and falls out of the softmax.

        Args:
            x: [N, T, D]

        Returns:
            [N, 1, D]
        """
        n, _, d = x.shape
        width = d // self.heads
        seen = _norm(x, self.norm1)
        query = self.qkv.part(0, d)(seen[:, :1]).view(n, self.heads, width)
        keys = self.qkv.weight[d : 2 * d].view(self.heads, width, d)
        values = self.qkv.part(2 * d, 3 * d)
        asked = torch.einsum("nhw,hwd->nhd", query, keys) * width**-0.5
        weights = torch.softmax(asked @ seen.transpose(1, 2), -1)
        mixed = torch.einsum("nhd,hwd->nhw", weights @ seen, values.weight.view(self.heads, width, d)).reshape(n, 1, d)
        return self._rest(x[:, :1], mixed if values.bias is None else mixed + values.bias)

    def to(self, dtype: torch.dtype) -> Block:
        """The block in another precision."""
        def cast(norm: Norm) -> Norm:
            return norm[0].to(dtype), norm[1].to(dtype), norm[2]

        scales = [None if scale is None else scale.to(dtype) for scale in (self.scale1, self.scale2)]
        return Block(cast(self.norm1), self.qkv.to(dtype), self.out.to(dtype), cast(self.norm2), self.up.to(dtype), self.activation, self.down.to(dtype), self.heads, *scales)

    def prepared(self) -> Block:
        """The same block, made fast for many passes: weights laid out for oneDNN on the CPU, x · sigmoid(1.702 x) as one kernel, silu, with the factor in the weights."""
        up, activation, down = self.up, self.activation, self.down
        if type(activation).__name__ in _QUICK_GELU:
            up = Linear(up.weight * _QUICK, None if up.bias is None else up.bias * _QUICK)
            activation, down = F.silu, Linear(down.weight / _QUICK, down.bias)
        qkv: Linear | FrozenLinear = self.qkv
        out: Linear | FrozenLinear = self.out
        if up.weight.device.type == "cpu" and works(up.weight.dtype):
            qkv, out, up, down = (FrozenLinear(layer.weight, layer.bias) for layer in (qkv, out, up, down))
        return Block(self.norm1, qkv, out, self.norm2, up, activation, down, self.heads, self.scale1, self.scale2)

    def _rest(self, x: Tensor, mixed: Tensor) -> Tensor:
        branch = self.out(mixed)
        x = x + (branch if self.scale1 is None else branch * self.scale1)
        branch = self.down(self.activation(self.up(_norm(x, self.norm2))))
        return x + (branch if self.scale2 is None else branch * self.scale2)


def _norm(x: Tensor, norm: Norm) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm[0], norm[1], norm[2])
