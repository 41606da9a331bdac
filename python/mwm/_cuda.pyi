"""CUDA kernels. mwm.ops checks, allocates and calls; see csrc/ops_cuda.h for the shapes. The last two arguments are device and stream."""

from collections.abc import Sequence

_View = tuple[int, Sequence[int], Sequence[int], int] | None

def plan_offsets(active: _View, offsets: _View, device: int, stream: int) -> None: ...
def build_plan(active: _View, visible: int, coords: _View, slots: _View, offsets: _View, device: int, stream: int) -> None: ...
def pack_tiles(x: _View, coords: _View, slots: _View, out: _View, device: int, stream: int) -> None: ...
def unpack_tiles(tiles: _View, slots: _View, fill: float, out: _View, device: int, stream: int) -> None: ...
def image_sum(x: _View, offsets: _View, out: _View, device: int, stream: int) -> None: ...
def tile_pool_forward(
    x: _View, coords: _View, slots: _View, geometry: list[int], pad_value: float, out: _View, taps: _View, device: int, stream: int
) -> None: ...
def tile_pool_backward(
    grad: _View, taps: _View, coords: _View, slots: _View, geometry: list[int], out: _View, device: int, stream: int
) -> None: ...
def depthwise_forward(
    x: _View, weight: _View, bias: _View, coords: _View, slots: _View, geometry: list[int], out: _View, device: int, stream: int
) -> None: ...
def depthwise_grad_input(
    grad: _View, weight: _View, coords: _View, slots: _View, geometry: list[int], out: _View, device: int, stream: int
) -> None: ...
def depthwise_grad_weight(
    grad: _View, x: _View, coords: _View, slots: _View, geometry: list[int], sums: _View, out: _View, device: int, stream: int
) -> None: ...
def tile_conv_grad_bias(grad: _View, sums: _View, out: _View, device: int, stream: int) -> None: ...
def batch_norm_moments(
    x: _View, sums: _View, mean: _View, var: _View, running_mean: _View, running_var: _View, momentum: float, device: int, stream: int
) -> None: ...
def batch_norm_apply(
    x: _View, residual: _View, weight: _View, bias: _View, mean: _View, var: _View, eps: float, activation: int, out: _View, device: int, stream: int
) -> None: ...
def batch_norm_backward(
    grad: _View,
    x: _View,
    out: _View,
    weight: _View,
    bias: _View,
    mean: _View,
    var: _View,
    eps: float,
    activation: int,
    sums: _View,
    totals: _View,
    grad_x: _View,
    grad_residual: _View,
    device: int,
    stream: int,
) -> None: ...
def region_coverage(region: _View, threshold: int, inside: _View, cover: _View, device: int, stream: int) -> None: ...
def region_active(
    region: _View,
    threshold: int,
    rule: list[int],
    seed: int,
    ids: _View,
    epoch: int,
    view: int,
    inside: _View,
    cover: _View,
    active: _View,
    device: int,
    stream: int,
) -> None: ...
def random_words(
    ids: _View, seed: int, epoch: int, view: int, tag: int, out: _View, device: int, stream: int
) -> None: ...
def sample_active(
    strata: _View,
    amounts: _View,
    exact: int,
    seed: int,
    ids: _View,
    epoch: int,
    view: int,
    weights: _View,
    active: _View,
    device: int,
    stream: int,
) -> None: ...
