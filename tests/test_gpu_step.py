"""A whole pre-training step on a GPU: captured in a CUDA graph, compiled as one graph, and the same in half precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mwm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GRID, BATCH, PATCH = (4, 5), 4, 32
POLICY = mwm.create_policy("region", high=0.8, overall=0.6)


def _model(name: str = "resnet18", decode: str = "dense") -> mwm.MaskedImageModel:
    import timm

    torch.manual_seed(0)
    net = mwm.sparsify(timm.create_model(name, features_only=True, in_chans=1))
    return mwm.MaskedImageModel(net, patch_size=PATCH, decoder_width=64, decode=decode).cuda().to(memory_format=torch.channels_last)


def _images(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(BATCH, 1, GRID[0] * PATCH, GRID[1] * PATCH, generator=generator)
    return images.cuda().contiguous(memory_format=torch.channels_last)


def _regions(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return (torch.rand(BATCH, *GRID, generator=generator) < 0.3).float().repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2).cuda()


def _masks(seed: int, device: str = "cuda") -> Tensor:
    ids = torch.arange(BATCH) + 10 * seed
    return POLICY(_regions(seed).to(device), grid=GRID, seed=1, ids=ids.to(device), epoch=2)


def _step(model: mwm.MaskedImageModel, optimizer: torch.optim.Optimizer, images: Tensor, active: Tensor, half: bool) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        loss = model(images, active, visible=POLICY.visible(GRID))
    loss.backward()
    optimizer.step()
    return loss.detach()


def _warm(function: Callable[[], object]) -> None:
    """Kernels are compiled and loaded outside of the capture, on a side stream as torch asks."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("name", "decode"), [("resnet18", "dense"), ("resnet18", "hidden"), ("test_convnext", "dense")])
def test_a_whole_training_step_is_captured_in_a_cuda_graph(name: str, decode: str, half: bool) -> None:
    """Replays with other images and masks in the same buffers give the losses of eager steps from the same weights."""
    model = _model(name, decode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    images, active = _images(0).clone(), _masks(0).clone()
    _warm(lambda: _step(model, optimizer, images, active, half))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(model, optimizer, images, active, half)

    kept = {key: value.clone() for key, value in model.state_dict().items()}
    moments = [{key: value.clone() for key, value in state.items()} for state in optimizer.state.values()]

    def restore() -> None:
        with torch.no_grad():
            for key, value in model.state_dict().items():
                value.copy_(kept[key])
            for state, saved in zip(optimizer.state.values(), moments, strict=True):
                for key, value in state.items():
                    value.copy_(saved[key])

    def replayed(seed: int) -> float:
        images.copy_(_images(seed))
        active.copy_(_masks(seed))
        graph.replay()
        return captured.item()

    losses = [replayed(seed) for seed in range(4)]
    restore()
    again = [replayed(seed) for seed in range(4)]
    restore()
    eager = [_step(model, optimizer, _images(seed), _masks(seed), half).item() for seed in range(4)]
    assert losses == pytest.approx(again, rel=1e-3)
    assert losses == pytest.approx(eager, rel=2e-2 if half else 1e-3)
    assert len({round(loss, 6) for loss in losses}) == 4


def test_drawing_masks_is_captured_too_and_equals_the_cpus() -> None:
    region, ids = _regions(0).clone(), torch.arange(BATCH, device="cuda")
    _warm(lambda: POLICY(region, grid=GRID, seed=1, ids=ids, epoch=2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        active = POLICY(region, grid=GRID, seed=1, ids=ids, epoch=2)
    for seed in range(3):
        region.copy_(_regions(seed))
        ids.copy_(torch.arange(BATCH) + 10 * seed)
        graph.replay()
        assert torch.equal(active.cpu(), _masks(seed, "cpu"))


@pytest.mark.parametrize(("name", "half"), [("resnet18", True), ("test_convnext", False)])
def test_a_step_compiles_as_one_graph_and_equals_the_eager_one(name: str, half: bool) -> None:
    torch.compiler.reset()
    model = _model(name)
    visible = POLICY.visible(GRID)
    compiled = torch.compile(lambda images, active: model(images, active, visible=visible), fullgraph=True)
    for seed in range(2):
        found = {}
        for label, function in (("eager", lambda images, active: model(images, active, visible=visible)), ("compiled", compiled)):
            state = {key: value.clone() for key, value in model.state_dict().items()}
            model.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                loss = function(_images(seed), _masks(seed))
            loss.backward()
            norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
            found[label] = loss.item(), norm.item()
            model.load_state_dict(state)
        assert found["compiled"] == pytest.approx(found["eager"], rel=5e-2 if half else 1e-3)


def test_no_step_waits_for_the_device() -> None:
    """torch's own watch on synchronising calls, over drawing masks and two steps."""
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    batch = [(_images(seed), _regions(seed), torch.arange(BATCH, device="cuda")) for seed in range(3)]

    def step(seed: int) -> Tensor:
        images, region, ids = batch[seed]
        return _step(model, optimizer, images, POLICY(region, grid=GRID, seed=1, ids=ids, epoch=2), True)

    step(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step(1), step(2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(loss) for loss in losses)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_the_second_device_runs_while_the_first_is_current() -> None:
    model = _model().to("cuda:1")
    images, active = _images(0), _masks(0)
    with torch.cuda.device(0):
        loss = model(images.to("cuda:1"), active.to("cuda:1"), visible=POLICY.visible(GRID))
        loss.backward()
    assert loss.device.index == 1
    first = _model()(images, active, visible=POLICY.visible(GRID))
    assert loss.item() == pytest.approx(first.item(), rel=1e-3)
