"""A step with a known number of visible patches never looks at values: no synchronisation, static shapes, fit for a CUDA graph.

Fake tensors have shapes and no values, so whatever would read one (.item(), .nonzero(), bool(), a copy to the CPU that is looked at) raises. They are placed
on "cuda", so that the lines taken are those of a GPU; no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

import mwm
from mwm.ops import gpu

GRID = (3, 4)


@pytest.fixture
def gpu_in_name(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Fake tensors, and Triton kernels that say they could run: the eager choices of a GPU are made, the kernels never called."""
    from mwm.ops import backend

    monkeypatch.setattr(gpu, "triton_missing", str)
    monkeypatch.setattr(backend, "_RESOLVED", {})
    with FakeTensorMode() as mode:
        yield mode


def _placed(module: nn.Module, device: str) -> nn.Module:
    """The module with fake parameters and buffers on a device."""
    for part in module.modules():
        for name, p in part._parameters.items():
            part._parameters[name] = p if p is None else nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device))
        for name, b in part._buffers.items():
            part._buffers[name] = b if b is None else torch.empty(b.shape, dtype=b.dtype, device=device)
    return module


def _model(name: str, decode: str = "dense") -> mwm.MaskedImageModel:
    import timm

    net = timm.create_model(name, features_only=True, in_chans=1)
    return mwm.MaskedImageModel(mwm.sparsify(net), patch_size=32, decoder_width=32, decode=decode)


def _batch(device: str) -> tuple[Tensor, Tensor]:
    return torch.empty(3, 1, 32 * GRID[0], 32 * GRID[1], device=device), torch.empty(3, *GRID, dtype=torch.bool, device=device)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("name", "decode"), [("resnet18", "dense"), ("resnet18", "hidden"), ("test_convnext", "dense")])
def test_the_forward_pass_on_a_gpu_looks_at_no_value(name: str, decode: str, autocast: bool, request: pytest.FixtureRequest) -> None:
    model = _model(name, decode)
    request.getfixturevalue("gpu_in_name")
    images, active = _batch("cuda")
    model = _placed(model, "cuda")
    torch.set_autocast_enabled("cuda", autocast)  # torch.autocast turns itself off where there is no GPU
    try:
        loss = model(images, active, visible=5)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert loss.shape == () and loss.device.type == "cuda" and loss.requires_grad


@pytest.mark.parametrize(("name", "decode"), [("resnet18", "dense"), ("resnet18", "hidden"), ("test_convnext", "dense")])
def test_the_backward_pass_looks_at_no_value(name: str, decode: str) -> None:
    """On "cpu": torch's engine wants a real device for others; the derivatives choose their kernels only inside the registered ops."""
    model = _model(name, decode)
    with FakeTensorMode():
        loss = _placed(model, "cpu")(*_batch("cpu"), visible=5)
        loss.backward()
    reached = [n for n, p in model.named_parameters() if p.grad is not None]
    assert len(reached) == sum(1 for n, _ in model.named_parameters() if n.removeprefix("net.") not in model.unreached)


@pytest.mark.parametrize("settings", [{"overall": 0.6}, {"overall": 0.6, "soft": True}])
def test_drawing_masks_on_a_gpu_looks_at_no_value(settings: dict, gpu_in_name: FakeTensorMode) -> None:
    policy = mwm.create_policy("region", high=0.8, **settings)
    region, ids = torch.empty(3, 96, 128, device="cuda"), torch.empty(3, dtype=torch.int64, device="cuda")
    active = policy(region, grid=GRID, seed=0, ids=ids, epoch=3)
    assert active.shape == (3, *GRID) and active.device.type == "cuda"


def test_the_tests_see_a_look_at_a_value(gpu_in_name: FakeTensorMode) -> None:
    _, active = _batch("cuda")
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        bool(active.any())
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        active.nonzero()
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException, NotImplementedError)):
        mwm.pack(_batch("cuda")[0], active)
