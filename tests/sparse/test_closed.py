"""Nothing computes per tile in silence: with every patch visible each torch function gives the dense answer, or raises."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mwm

B, C, ROWS, COLUMNS, EDGE = 2, 6, 2, 3, 4
# What Packed answers about itself, as Tensor does about itself: sizes and storage are those of the tiles.
READ_SURFACE = {"dim", "ndimension", "size", "numel", "nelement", "stride", "is_contiguous", "element_size", "get_device", "requires_grad_", "retain_grad",
                "is_floating_point", "is_complex", "type", "result_type", "is_tensor", "can_cast", "is_storage"}
RANDOM = {"dropout", "dropout_", "alpha_dropout", "alpha_dropout_", "dropout2d", "feature_dropout", "feature_dropout_", "rrelu", "rrelu_", "native_dropout"}
NEVER = {"set_printoptions", "save", "load", "manual_seed", "seed", "set_num_threads", "set_num_interop_threads", "set_default_device", "set_default_dtype",
         "set_default_tensor_type", "compile", "set_deterministic_debug_mode", "use_deterministic_algorithms", "set_flush_denormal", "set_warn_always",
         "set_float32_matmul_precision", "set_rng_state", "import_ir_module", "fork", "wait", "set_anomaly_enabled", "set_grad_enabled", "jit", "cond",
         "set_autocast_enabled", "set_autocast_dtype", "set_autocast_gpu_dtype", "set_autocast_cpu_dtype", "set_autocast_cache_enabled", "set_vital",
         "autocast_increment_nesting", "autocast_decrement_nesting", "clear_autocast_cache", "init_num_threads", "set_autocast_ipu_enabled", "hub",
         "set_autocast_cpu_enabled", "set_autocast_xla_enabled", "set_autocast_ipu_dtype", "set_autocast_xla_dtype", "read_vitals", "get_file_path",
         "prepare_multiprocessing_environment", "initial_seed", "has_torch_function", "vmap", "classproperty", "has_torch_function_unary", "has_torch_function_variadic",
         "handle_torch_function", "get_rng_state", "typename", "is_storage", "unravel_index", "export"}


IMAGES = torch.randn(B, C, ROWS * EDGE, COLUMNS * EDGE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
PACKED = mwm.pack(IMAGES, torch.ones(B, ROWS, COLUMNS, dtype=torch.bool))


def images() -> Tensor:
    return IMAGES.clone()


def packed() -> mwm.Packed:
    return mwm.Packed(PACKED.tiles.clone(), PACKED.plan)


def recipes(kind: str) -> Iterator[tuple[tuple, dict]]:
    """Arguments after the first; "map" stands for a second map."""
    yield (), {}
    for value in (2, 1, -1, 0, 0.5, None, torch.float64, (2, 3), (1,), (2, 2), (-1, C), "map", "rows", "parameter", "vector"):
        yield (value,), {}
    for pair in ((1, True), ((2, 3), True), ((1, 2, 3), True), (2, 1), (1, 2), (0, 1), (2, 3), (3, 2), (0.1, 0.9), (0.5, "map"), ("map", "map"), (1, "map"), ("map", 0.3),
                 (3, 1), (2, 2), (1, 0), ((1, 1, 1, 1), "constant"), ([2, 4], 1), (1, (2, 3)), ((2, 3), (0, 1))):
        yield pair, {}
    for triple in ((0, 2, 3, 1), (B, 2, 3, ROWS * EDGE, -1), (3, 1, 1), (3, 2, 1), (1, 0, 2), (1, 1, 2), (2, (2, 3), True), (1, 0, 1), (B, -1), (0.5, True)):
        yield triple, {}
    for name in ("dim", "axis"):
        for dims in (1, 2, (2, 3), 0):
            yield (), {name: dims}
    if kind == "functional":
        weight, depthwise, vector = torch.randn(C, C, 3, 3).double(), torch.randn(C, 1, 3, 3).double(), torch.rand(C).double()
        yield (weight,), {"padding": 1}
        yield (weight, vector, 2, 1), {}
        yield (weight, None, 1, "same"), {}
        yield (depthwise,), {"padding": 1, "groups": C}
        yield (torch.randn(C, C, 2, 2).double(),), {"stride": 2}
        yield (torch.randn(C, C, 1, 1).double(),), {"stride": 2}
        yield (vector, vector), {}
        yield (vector, vector, vector, vector), {"training": True}
        yield (None, None), {"training": True}
        yield (3, vector, vector), {}
        yield ((C,), vector), {}
        yield (), {"scale_factor": 2}
        yield (), {"scale_factor": 2, "mode": "bilinear"}
        yield (), {"scale_factor": 0.5}
        yield (), {"size": (16, 24)}
        yield ((1, 1, 1, 1),), {}
        yield ((0, 0, 0, 0, 1, 1),), {}
        yield ((1, 1, 1, 1),), {"mode": "reflect"}
        yield (3,), {"stride": 2, "padding": 1, "ceil_mode": True}


def filled(value: Any, mine: bool) -> Any:
    if value == "map" if isinstance(value, str) else False:
        return packed() * 0.5 if mine else images() * 0.5
    if isinstance(value, str) and value == "rows":
        return torch.arange(B * C).double().reshape(B, C, 1, 1)
    if isinstance(value, str) and value == "parameter":
        return torch.arange(C).double().reshape(C, 1, 1)
    if isinstance(value, str) and value == "vector":
        return torch.arange(C).double() + 0.5
    return value.clone() if isinstance(value, Tensor) else value


def dense_like(x: mwm.Packed, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [B, channels, H, W]."""
    axes = x._axes
    order = [0, *(i for i, a in enumerate(axes) if a == "C"), axes.index("H"), axes.index("W")]
    data = x._data.permute(order)
    data = data.reshape(data.shape[0], -1, *data.shape[-2:])
    expected = expected.permute(order)
    expected = expected.reshape(expected.shape[0], -1, *expected.shape[-2:])
    return mwm.Packed(data, x.plan).unpack(), expected


def agree(found: Any, expected: Any) -> bool:
    if isinstance(found, mwm.Packed):
        if not isinstance(expected, Tensor) or expected.dim() != found.dim() or found._margin is not None:
            return found._margin is not None  # pending padding refuses everything but the next conv or pool
        found, expected = dense_like(found, expected)
    if isinstance(found, Tensor):
        return isinstance(expected, Tensor) and found.shape == expected.shape and torch.allclose(found.double(), expected.double(), atol=1e-9, equal_nan=True)
    if isinstance(found, list | tuple):
        return len(found) == len(expected) and all(agree(a, b) for a, b in zip(found, expected, strict=True))
    return found is None or found == expected


def check(call: Callable[[Any, tuple, dict], Any], kind: str) -> tuple[int, int, list]:
    """(recipes that agreed, that were refused, disagreements)"""
    agreed, refused, wrong = 0, 0, []
    for args, kwargs in recipes(kind):
        torch.manual_seed(0)
        try:
            expected = call(images(), tuple(filled(a, False) for a in args), kwargs)
        except Exception:
            continue
        torch.manual_seed(0)
        x = packed()
        try:
            found = call(x, tuple(filled(a, True) for a in args), kwargs)
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, NotImplementedError) as error:
            refused += 1
            if "is not known to act" in str(error):
                break  # whatever its arguments
            continue
        if agree(found, expected):
            agreed += 1
        else:
            wrong.append((args, kwargs, type(found).__name__))
    return agreed, refused, wrong


def sweep(calls: dict[str, Callable], kind: str) -> tuple[int, int]:
    wrong, agreed, refused = {}, 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, call in calls.items():
            a, r, bad = check(call, kind)
            agreed, refused = agreed + a, refused + r
            if bad:
                wrong[name] = bad[:3]
    assert not wrong, wrong
    return agreed, refused


def test_every_tensor_method_is_dense_or_refused() -> None:
    ours = {n for n in dir(object) if n not in {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}}
    names = [n for n in dir(Tensor) if callable(getattr(Tensor, n)) and n not in ours | READ_SURFACE | RANDOM and n not in ("__torch_function__", "__subclasshook__")]
    agreed, refused = sweep({n: lambda x, args, kwargs, n=n: getattr(x, n)(*args, **kwargs) for n in names}, "method")
    assert agreed > 300 and refused > 500, (agreed, refused)


@pytest.mark.parametrize(("space", "least"), [(F, 150), (torch, 300), (torch.special, 20), (torch.linalg, 2)], ids=["functional", "torch", "special", "linalg"])
def test_every_function_is_dense_or_refused(space: Any, least: int) -> None:
    names = [n for n in dir(space) if not n.startswith("_") and n not in READ_SURFACE | RANDOM | NEVER]
    functions = {n: getattr(space, n) for n in names if callable(getattr(space, n)) and not inspect.isclass(getattr(space, n))}
    agreed, _ = sweep({n: lambda x, args, kwargs, f=f: f(x, *args, **kwargs) for n, f in functions.items()}, "functional")
    assert agreed >= least


MODULE_ARGUMENTS = ((), (C,), (2,), (3,), (C, C, 3), (C, C), (3, C), (2, C), ((2, 3),), (1,), (0.5, 0.5), (C, C, 1), (1, 2, 0), (C, 2), (-1, 2), (1, (2, 3)))
MODULE_KEYWORDS = ({}, {"padding": 1}, {"stride": 2, "padding": 1}, {"padding": 1, "padding_mode": "reflect"}, {"scale_factor": 2}, {"padding": "same"})


def test_every_module_is_dense_or_refused() -> None:
    wrong, agreed = {}, 0
    classes = {n: k for n, k in vars(nn).items() if inspect.isclass(k) and issubclass(k, nn.Module) and "Dropout" not in n and n != "RReLU"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, kind in classes.items():
            for args in MODULE_ARGUMENTS:
                for kwargs in MODULE_KEYWORDS:
                    torch.manual_seed(0)
                    try:
                        module = kind(*args, **kwargs).double()
                        expected = module(images())
                    except Exception:
                        continue
                    torch.manual_seed(0)
                    try:
                        found = mwm.sparsify(kind(*args, **kwargs).double())(packed())
                    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
                        continue
                    if agree(found, expected):
                        agreed += 1
                    else:
                        wrong[name] = (args, kwargs)
    assert not wrong, wrong
    assert agreed > 60


class AsksItsSize(nn.Module):
    """Does something else on small maps, or for a batch of one, as VGG's head in timm does."""

    def __init__(self, question: Callable[[Any], bool]) -> None:
        super().__init__()
        self.question = question

    def forward(self, x: Any) -> Any:
        return x * 2 if self.question(x) else x


@pytest.mark.parametrize("question", [
    lambda x: x.shape[-1] < 7, lambda x: x.shape[-2] == 4, lambda x: 8 <= x.size(2), lambda x: x.shape[0] == 1, lambda x: max(7, x.shape[-1]) > 7,
])
def test_comparing_the_size_of_a_tile_with_a_number_is_refused_since_the_image_would_answer_otherwise(question: Callable[[Any], bool]) -> None:
    with pytest.raises(mwm.sparse.PackedError, match=r"comparison of the batch size, height or width with [0-9]+ cannot run"):
        mwm.sparsify(AsksItsSize(question))(packed())


def test_comparing_the_sizes_of_two_maps_is_answered() -> None:
    doubled = mwm.sparsify(AsksItsSize(lambda x: x.shape[-1] == x.shape[-2] and x.shape == (x + 1).shape and x.shape[-1] <= x.size(2)))(packed())
    assert torch.equal(doubled.tiles, PACKED.tiles * 2)
