"""An encoder four ways: packed tiles, dense, dense and compiled, and mask-multiply; one training step of each, and whether they agree.

A step goes from dense images to all maps, unpacked, and back: `torch.autograd.backward(maps, gradients)`, so that nothing but the
encoder (with plan, pack and unpack on our side) is timed. Gradients accumulate into `.grad`, as in training.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable

import timm
import torch
from mwm.bench.harness import Check, Step, joint_difference, worst_difference
from mwm.bench.mask_multiply import MaskMultiply
from torch import Tensor, nn

import mwm

OURS, DENSE, COMPILED, MASKED, MASKED_LAST = "ours", "dense channels-last", "dense channels-last, torch.compile", "mask-multiply NCHW", "mask-multiply channels-last"

MAPS, GRADIENTS = 1e-4, 1e-2
"""Largest relative difference of the maps and of the parameters' gradients, taken as one vector, in float32.

A ReLU whose input rounds to the other side of zero switches a gradient, so that float32 runs of the dense ResNet-50 (NCHW,
channels-last) differ from each other, and from float64, by 1e-3 to 3e-3; without ReLUs (ConvNeXt) all sides agree to 2e-6.
"""


def random_active(batch: int, grid: tuple[int, int], hidden: float, seed: int = 0) -> tuple[Tensor, int]:
    """The same number of visible patches in every image. bool [B, Gh, Gw], and that number."""
    patches = grid[0] * grid[1]
    visible = patches - round(hidden * patches)
    order = torch.rand(batch, patches, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return (order < visible).view(batch, *grid), visible


def waken(network: nn.Module) -> nn.Module:
    """Set the scales that start at or near zero (last norm of a residual block, layer scale) to 0.1.

    A block whose scale is zero adds nothing and passes no gradient on: a wrong layer in it would not be noticed.
    """
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.ndim == 1 and name.rsplit(".", 1)[-1] in {"weight", "gamma"} and p.abs().max() < 1e-3:
                p.fill_(0.1)
    return network


class EncoderSides:
    """The sides of one encoder on one batch; each is built when it is first asked for, all from the same weights.

    Args:
        name: a timm model.
        hidden: share of hidden patches.
        batch, size, patch: images, their edge and the patch's, pixels.
        bf16: bfloat16 autocast around the forward pass of every side.
        compiler: backend of torch.compile.
        device: where images and networks lie.
    """

    def __init__(self, name: str, hidden: float, *, batch: int = 8, size: int = 224, patch: int = 32, bf16: bool = False,
                 compiler: str = "inductor", device: str = "cpu", **timm_options: object) -> None:
        torch.manual_seed(0)
        self.bf16, self.compiler, self.device = bf16, compiler, device
        self._net = waken(timm.create_model(name, features_only=True, **timm_options).train())
        self.channels, self.strides = self._net.feature_info.channels(), self._net.feature_info.reduction()
        self.images = torch.randn(batch, 3, size, size).to(device)
        self.images_last = self.images.to(memory_format=torch.channels_last)
        active, self.visible = random_active(batch, (size // patch, size // patch), hidden)
        self.active = active.to(device)
        self.share = self.visible / self.active[0].numel()

    @functools.cached_property
    def ours(self) -> nn.Module:
        """The sparsified network."""
        return mwm.sparsify(copy.deepcopy(self._net)).to(self.device, memory_format=torch.channels_last)

    @functools.cached_property
    def dense(self) -> nn.Module:
        """The dense network, channels-last."""
        return copy.deepcopy(self._net).to(self.device, memory_format=torch.channels_last)

    @functools.cached_property
    def compiled(self) -> Callable[[Tensor], list[Tensor]]:
        """The dense network, channels-last, compiled."""
        network = copy.deepcopy(self._net).to(self.device, memory_format=torch.channels_last)
        return torch.compile(network, backend=self.compiler)

    @functools.cached_property
    def masked(self) -> nn.Module:
        """Mask-multiply as SparK ships it, NCHW."""
        return MaskMultiply(self._net).to(self.device)

    @functools.cached_property
    def masked_last(self) -> nn.Module:
        """Mask-multiply, channels-last."""
        return MaskMultiply(self._net).to(self.device, memory_format=torch.channels_last)

    def network(self, side: str) -> nn.Module:
        """The network of a side."""
        return {OURS: lambda: self.ours, DENSE: lambda: self.dense, COMPILED: lambda: self.compiled, MASKED: lambda: self.masked,
                MASKED_LAST: lambda: self.masked_last}[side]()

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def maps(self, side: str) -> Callable[[], list[Tensor]]:
        """The forward pass of a side, from dense images to all maps."""
        images, last, active = self.images, self.images_last, self.active
        run = {
            OURS: lambda: [m.unpack() for m in self.ours(mwm.pack(last, active, visible=self.visible))],
            DENSE: lambda: self.dense(last),
            COMPILED: lambda: self.compiled(last),
            MASKED: lambda: self.masked(images, active),
            MASKED_LAST: lambda: self.masked_last(last, active),
        }[side]

        def forward() -> list[Tensor]:
            with self._autocast():
                return run()

        return forward

    def step(self, side: str) -> Step:
        """One training step of a side."""
        forward = self.maps(side)
        with torch.no_grad():
            like = forward()
        gradients = self._gradients(like)

        def step() -> None:
            torch.autograd.backward(forward(), gradients)

        return step

    def _gradients(self, like: list[Tensor]) -> list[Tensor]:
        """The same gradients for every side, in the layout of its maps, scaled so that the maps weigh alike."""
        generator = torch.Generator().manual_seed(1)
        values = [torch.randn(m.shape, generator=generator) / m[0].numel() ** 0.5 for m in like]
        return [torch.empty_like(m).copy_(v) for v, m in zip(values, like, strict=True)]

    def check(self, side: str) -> Check:
        """Whether a side computes what ours does.

        The dense network computes something else as soon as anything is hidden, so it is compared with all patches
        visible. In bfloat16 both sides are compared with mask-multiply (dense: the dense network) in float32, and ours
        may be twice as far away as the rival.
        """
        if side in (DENSE, COMPILED):
            whole = torch.ones_like(self.active)
            return self._compare(lambda: [m.unpack() for m in self.ours(mwm.pack(self.images_last, whole, visible=whole[0].numel()))],
                                 self.maps(side), self.ours, self.dense if side == DENSE else self.compiled, lambda: self.dense(self.images_last))
        return self._compare(lambda: [m.unpack() for m in self.ours(mwm.pack(self.images_last, self.active, visible=self.visible))],
                             self.maps(side), self.ours, self.masked if side == MASKED else self.masked_last, lambda: self.masked(self.images, self.active))

    def _compare(self, mine: Callable[[], list[Tensor]], rival: Callable[[], list[Tensor]], ours: nn.Module, theirs: nn.Module,
                 reference: Callable[[], list[Tensor]]) -> Check:
        with self._autocast():
            got = mine()
        want = rival()
        if self.bf16:
            with torch.no_grad():
                exact = reference()
            return Check(worst_difference(got, exact), 2 * worst_difference(want, exact))
        gradients = []
        for network, maps in ((ours, got), (theirs, want)):
            torch.autograd.backward(maps, self._gradients(maps))
            gradients.append([p.grad for p in network.parameters() if p.grad is not None])
            network.zero_grad(set_to_none=True)
        difference = worst_difference(got, want)
        of_gradients = joint_difference(*gradients)
        # One figure for both: the gradients' difference is brought to the maps' scale.
        return Check(max(difference, of_gradients * MAPS / GRADIENTS) if of_gradients == of_gradients else of_gradients, MAPS)
