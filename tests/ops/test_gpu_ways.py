"""Which way a convolution takes on a GPU: chosen from shapes, dtype and device's name alone; tried with tensors that have no memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mwm.ops import gpu, tile_conv_gpu

pytest.importorskip("triton")
PLAIN = [1, 1, 1, 1, 1, 1, 1, 1]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """Tensors made in the test lie on a GPU that nobody has; the fixture's value is the config table of its device."""
    configs = gpu.triton_kernels("conv_configs")
    plain = configs.table
    own: dict = {"tile_conv": {}}
    monkeypatch.setattr(tile_conv_gpu, "resolve", lambda op, backend, x: backend or ("cuda" if op == "depthwise_conv" else "triton"))
    monkeypatch.setattr(configs, "device_name", lambda device: "tried")
    monkeypatch.setattr(configs, "table", lambda device: own if device == "tried" else plain(device))
    configs.pick.cache_clear()
    with FakeTensorMode():
        yield own
    configs.pick.cache_clear()


def _choose(weight: tuple[int, ...], geometry: list[int], *, dtype: torch.dtype = torch.bfloat16, tiles: int = 80, edge: int = 4, backend: str = "",
            direction: str = "forward") -> str:
    x: Tensor = torch.empty(tiles, weight[1] * geometry[7], edge, edge, dtype=dtype, device="cuda")
    slots = torch.empty(10, 2, 5, dtype=torch.int32, device="cuda")
    return tile_conv_gpu.choose(direction, backend, x, weight, slots, geometry, edge // geometry[0] if direction == "forward" else edge)


def test_1x1_and_patchify_are_products_of_torch_and_depthwise_has_its_own_entry(on_gpu: dict) -> None:
    assert _choose((8, 16, 1, 1), [1, 1, 1, 0, 0, 0, 0, 1]) == "gemm"
    assert _choose((8, 16, 4, 4), [4, 1, 1, 0, 0, 0, 0, 1], dtype=torch.float32) == "gemm"
    assert _choose((8, 16, 1, 1), [1, 1, 1, 0, 0, 0, 0, 1], backend="triton") == "triton"
    assert _choose((8, 16, 1, 1), [2, 1, 1, 0, 0, 0, 0, 1]) == "triton"
    assert _choose((8, 16, 3, 3), PLAIN) == "triton"
    assert _choose((8, 1, 7, 7), [1, 1, 1, 3, 3, 3, 3, 8]) == "cuda"
    assert _choose((8, 1, 7, 7), [1, 1, 1, 3, 3, 3, 3, 8], backend="triton") == "triton"


def test_a_table_can_send_a_layer_to_the_dense_convolution_from_a_visible_share_on(on_gpu: dict) -> None:
    on_gpu["tile_conv"] = {"forward": {"16": [{"max_rows": 64 * 1280, "max_columns": 64, "max_depth": 64, "dense_from": 0.8}]}}
    layer = (64, 64, 3, 3)
    assert _choose(layer, PLAIN, tiles=80) == "dense"
    assert _choose(layer, PLAIN, tiles=79) == "triton"
    assert _choose(layer, PLAIN, tiles=80, backend="triton") == "triton"
    assert _choose(layer, PLAIN, tiles=80, direction="grad_input") == "triton"
    assert _choose((128, 64, 3, 3), PLAIN, tiles=100) == "triton"
    assert _choose(layer, PLAIN, tiles=100, dtype=torch.float32) == "triton"


def test_tf32_only_where_matrix_products_may_use_it(on_gpu: dict) -> None:
    single, half = (torch.empty(1, device="cuda", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for setting, wanted in (("ieee", False), ("tf32", True)):
            matmul.fp32_precision = setting
            assert tile_conv_gpu.tf32(single) is wanted
            assert tile_conv_gpu.tf32(half) is False
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("before", [False, True])
def test_the_dense_way_asks_for_algorithms_that_repeat_and_leaves_the_users_setting(before: bool) -> None:
    saved = torch.backends.cudnn.deterministic
    try:
        torch.backends.cudnn.deterministic = before
        with pytest.raises(KeyError), tile_conv_gpu.repeatable():
            assert torch.backends.cudnn.deterministic
            raise KeyError
        assert torch.backends.cudnn.deterministic is before
    finally:
        torch.backends.cudnn.deterministic = saved
