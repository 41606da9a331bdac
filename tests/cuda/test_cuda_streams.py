"""What only a GPU can show: streams, devices, graphs, no waiting, and the same bits again under load. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mwm import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BACKENDS = ["cuda", "triton"]
VISIBLE, GRID, EDGE = 20, (7, 7), 8
_LONG = 50_000_000  # clock cycles that a stream is kept busy


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if found := ops.reasons("depthwise_conv", request.param, torch.empty(1, device="cuda")):
        pytest.skip("; ".join(found))
    return request.param


def _active(batch: int, seed: int, device: str = "cuda") -> Tensor:
    order = torch.rand(batch, GRID[0] * GRID[1], generator=torch.Generator().manual_seed(seed)).argsort(1)
    return (order < VISIBLE).reshape(batch, *GRID).to(device)


def _weights(device: str = "cuda", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(shape, generator=generator).mul(0.2).to(device=device, dtype=dtype).requires_grad_() for shape in ((32, 1, 7, 7), (32, 32, 3, 3))]


def _step(x: Tensor, active: Tensor, weights: list[Tensor], backend: str | None) -> list[Tensor]:
    """A small network with every kind of op, and its gradients."""
    plan = ops.build_plan(active, EDGE, visible=VISIBLE, backend=None if backend == "triton" else backend)
    forced = {"backend": backend}
    tiles = ops.pack_tiles(x, plan, **forced)
    tiles = ops.tile_conv(tiles, weights[0], None, plan, padding=3, groups=32, **forced)
    tiles = F.relu(ops.tile_conv(tiles, weights[1], None, plan, padding=1))
    pooled = ops.tile_pool(tiles, plan, kernel_size=3, stride=2, padding=1)
    means = ops.image_expand(ops.image_sum(pooled, plan), plan)[:, :, None, None]
    dense = ops.unpack_tiles(pooled * means, plan, **forced)
    return [dense, *torch.autograd.grad(dense.square().mean(), [x, *weights])]


def _input(batch: int = 4, device: str = "cuda", dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(batch, 32, GRID[0] * EDGE, GRID[1] * EDGE, generator=torch.Generator().manual_seed(3))
    return x.to(device=device, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()


def test_ops_run_on_torchs_current_stream(backend: str) -> None:
    """The inputs arrive late on a side stream; an op on another stream would read what was there before."""
    x, active, weights = _input(), _active(4, 1), _weights()
    expected = [t.clone() for t in _step(x, active, weights, backend)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x).requires_grad_()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(_LONG)
        with torch.no_grad():
            late.copy_(x)
        found = _step(late, active, weights, backend)
    stream.synchronize()
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


def test_nothing_waits_for_the_device_where_the_count_is_known(backend: str) -> None:
    x, active, weights = _input(), _active(4, 1), _weights()
    region, ids = torch.rand(4, 56, 56, device="cuda"), torch.arange(4, device="cuda")
    ratio = ops.to_q32([0.4, 0.8]).cuda()
    _step(x, active, weights, backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(x, active, weights, backend)
        inside, _ = ops.region_coverage(region, GRID, backend=backend)
        ops.sample_active(inside.flatten(1), ratio, grid=GRID, seed=0, ids=ids, epoch=0, weights=torch.rand_like(inside.flatten(1), dtype=torch.float32), backend=backend)
        ops.region_active(region, GRID, [0, 1 << 31, 0], seed=0, ids=ids, epoch=0, backend="cuda" if backend == "cuda" else None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_is_captured_in_a_graph_and_replayed_with_new_masks(backend: str) -> None:
    x, active, weights = _input(), _active(4, 1), _weights()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            _step(x, active, weights, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(x, active, weights, backend)
    for seed in (2, 3):
        active.copy_(_active(4, seed))
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        found = [t.clone() for t in captured]
        expected = _step(x, active, weights, backend)
        assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_repeat_bit_for_bit_while_another_stream_is_busy(dtype: torch.dtype, backend: str) -> None:
    x, active, weights = _input(16, dtype=dtype), _active(16, 1), _weights(dtype=dtype)
    expected = [t.clone() for t in _step(x, active, weights, backend)]
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(other):
            noise = (noise @ noise).clamp(-1, 1)
        found = _step(x, active, weights, backend)
        assert all(torch.equal(mine, wanted) for mine, wanted in zip(found, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_ops_run_on_the_device_of_their_tensors_and_leave_the_current_one(backend: str) -> None:
    expected = _step(_input(), _active(4, 1), _weights(), backend)
    found = _step(_input(device="cuda:1"), _active(4, 1, "cuda:1"), _weights("cuda:1"), backend)
    assert torch.cuda.current_device() == 0
    assert all(mine.device.index == 1 and torch.equal(mine.cpu(), other.cpu()) for mine, other in zip(found, expected, strict=True))


def test_backends_agree_with_the_reference_on_a_whole_step(backend: str) -> None:
    """The same step on the CPU, in float64 through the reference."""
    found = _step(_input(), _active(4, 1), _weights(), backend)
    before = torch.backends.cudnn.allow_tf32
    expected = _cpu_step()
    torch.backends.cudnn.allow_tf32 = before
    for mine, other in zip(found, expected, strict=True):
        assert (mine.cpu().double() - other).norm() <= 1e-3 * other.norm()


def _cpu_step() -> list[Tensor]:
    return _step(_input(device="cpu", dtype=torch.float64), _active(4, 1, "cpu"), _weights("cpu", torch.float64), "reference")


@pytest.mark.parametrize("visible", [None, VISIBLE])
def test_an_uncounted_mask_waits_once_and_a_counted_one_never(visible: int | None) -> None:
    active = _active(4, 1)
    ops.build_plan(active, EDGE, visible=visible)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    waited = 0
    try:
        ops.build_plan(active, EDGE, visible=visible)
    except RuntimeError:
        waited = 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waited == (visible is None)


def test_a_wrong_count_is_a_device_side_assertion(tmp_path: object) -> None:
    """In a process of its own: the assertion ends the context."""
    import subprocess
    import sys

    text = (
        "import torch; from mwm import ops\n"
        "active = torch.ones(2, 2, 2, dtype=torch.bool, device='cuda'); active[1, 0, 0] = False\n"
        "ops.build_plan(active, 8, visible=4)\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode != 0
    assert "assert" in done.stderr


def _names_of(function: Callable[[], object]) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA and "Memset" not in event.name]


def test_masks_of_4096_images_are_one_launch(backend: str) -> None:
    strata, ratio, ids = torch.randint(0, 2, (4096, 49), device="cuda"), ops.to_q32([0.4, 0.8]).cuda(), torch.arange(4096, device="cuda")

    def draw() -> Tensor:
        return ops.sample_active(strata, ratio, grid=GRID, seed=0, ids=ids, epoch=0, backend=backend)

    draw()
    names = _names_of(draw)
    if not names:
        pytest.skip("the profiler sees no kernel on this machine")
    assert len(names) == 1, names
