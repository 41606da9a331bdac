"""Forward and backward of a step as CUDA graphs: hundreds of launches from Python become one.

Launched one by one, a sparse step on a fast GPU is bound by the host (the eager rows of bench/RESULTS_GPU.md). A graph is bound to its shapes, and those of packed
tiles follow from the number of visible patches in the batch: there is a graph for each number that comes up. Masks of a fixed count need one; those of two shares several,
whose memory is shared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mwm.ops import TilePlan, build_plan
from mwm.train.config import TrainError
from mwm.train.loader import to_device

WARM = 3  # steps before the first capture: kernels are compiled, loaded and chosen outside of it
LIMIT = 64  # graphs that are kept; other numbers of visible patches run as without graphs


class Recorder(Protocol):
    """What runs and captures work on a device."""

    def beside(self, function: Callable[[], Tensor]) -> Tensor:
        """Run a function as it is, on the stream on which others are captured."""

    def record(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Capture a function without running it: where its result will lie, and what runs it."""


class CudaRecorder:
    """CUDA graphs of one device, in one pool of memory.

    Their order is free although they share memory: nothing that one leaves behind is read after another has begun.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def beside(self, function: Callable[[], Tensor]) -> Tensor:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Loader threads may pin memory meanwhile, which the default mode takes for a mistake of the captured work.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = function()
        return result, graph.replay


def check(device: torch.device, processes: int) -> None:
    """Refuses what steps cannot be captured on.

    Raises:
        TrainError: the device has no CUDA graphs, or several processes share the step.
    """
    if device.type != "cuda":
        raise TrainError(f"pretrain: cuda_graph must be false on {device.type}, which has no CUDA graphs, got true. Leave it out, or take --device cuda.")
    if processes > 1:
        raise TrainError(f"pretrain: cuda_graph must be false with several processes, got true with {processes}. Leave it out, or start one process.")


def check_masks(decode: str, visible: int | None) -> None:
    """Refuses masks whose *hidden* patches a captured step would have to count on the device.

    Args:
        decode: "dense" or "hidden".
        visible: visible patches per image where constant.

    Raises:
        TrainError: decode="hidden" with masks whose count varies.
    """
    if decode == "hidden" and visible is None:
        raise TrainError("pretrain: cuda_graph with decode hidden must have masks of a fixed count, got one that follows the regions. Give --mask-ratio, or leave one of "
                         "the two out.")


class CapturedGradients:
    """Fills the parameters' `.grad` and returns what the step reports, replaying a graph where one fits.

    Args:
        gradients: (images, plan, others) -> report: forward and backward, adding to `.grad`; nothing of it may depend on the host's state.
        parameters: whose `.grad` is filled. They keep their memory from the first step on: do not set them to None.
        patch_size: edge of a patch, pixels.
        device: where the work runs.
        recorder: what captures it; None makes a `CudaRecorder`.
    """

    def __init__(self, gradients: Callable[[Tensor, TilePlan, Sequence[Tensor]], Tensor], parameters: Sequence[nn.Parameter], patch_size: int, device: torch.device,
                 recorder: Recorder | None = None) -> None:
        self._gradients, self._parameters, self._patch_size, self._device = gradients, list(parameters), patch_size, device
        self._recorder = recorder or CudaRecorder(device)
        self._graphs: dict[int, tuple[list[Tensor], Tensor, Callable[[], None]]] = {}
        self._seen: Counter[int] = Counter()
        self._shared: list[Tensor] | None = None

    def __call__(self, images: Tensor, active: Tensor, visible: int | None, others: Sequence[Tensor]) -> Tensor:
        """One step's gradients.

        Args:
            images: on the device, always of one shape. [B, C, H, W]
            active: True where visible, in host memory, so that the number of visible patches is known. bool [B, Gh, Gw]
            visible: visible patches per image where constant.
            others: further tensors of the step, always of the same shapes.

        Raises:
            TrainError: the step cannot be captured; the message gives the reason.
        """
        plan = build_plan(active, self._patch_size, visible=visible)
        tiles, fresh = plan.num_tiles, [images, *others]
        self._seen[tiles] += 1
        if tiles not in self._graphs:
            if self._seen.total() <= WARM or self._seen[tiles] == 1 or len(self._graphs) == LIMIT:
                there, moved = plan.to(self._device), [to_device(x, self._device) for x in others]
                return self._recorder.beside(lambda: self._run(images, there, moved))
            self._graphs[tiles] = self._capture(plan, fresh)
        layout, result, replay = self._graphs[tiles]
        for own, value in zip([*layout, *self._shared], [*plan.tensors(), *fresh], strict=True):
            _fill(own, value)
        replay()
        return result.clone()

    def _capture(self, plan: TilePlan, fresh: list[Tensor]) -> tuple[list[Tensor], Tensor, Callable[[], None]]:
        if self._shared is None:
            self._shared = [torch.empty_like(x, device=self._device) for x in fresh]
        own = TilePlan(*(torch.empty_like(x, device=self._device) for x in plan.tensors()), plan.patch_size, plan.visible)  # filled before every replay
        try:
            result, replay = self._recorder.record(lambda: self._run(self._shared[0], own, self._shared[1:]))
        except (RuntimeError, NotImplementedError) as error:
            raise TrainError(f"pretrain: cuda_graph must be left out with this encoder and these settings, the step cannot be captured ({str(error).splitlines()[0]}). "
                             "Run again without it.") from error
        return list(own.tensors()), result, replay

    def _run(self, images: Tensor, plan: TilePlan, others: Sequence[Tensor]) -> Tensor:
        kept = [p.grad for p in self._parameters if p.grad is not None]
        if kept:
            torch._foreach_zero_(kept)
        return self._gradients(images, plan, others)


def _fill(own: Tensor, value: Tensor) -> None:
    """Copy to where a graph reads, without waiting for the device."""
    own.copy_(value.pin_memory() if own.is_cuda and value.device.type == "cpu" else value, non_blocking=True)
