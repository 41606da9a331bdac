"""An op called directly is the registered op: same values, derivatives and refusals; where something watches the dispatcher it goes there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mwm.ops import registry

CALLS: list[str] = []


def _implementation(x: Tensor, factor: Tensor, shift: float) -> Tensor:
    CALLS.append("implementation")
    return (x * factor + shift).t()  # a view of something of its own


def _setup(ctx: object, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: object, grad: Tensor) -> tuple:
    x, factor = ctx.saved_tensors
    return grad.t() * factor if ctx.needs_input_grad[0] else None, (grad.t() * x).sum() if ctx.needs_input_grad[1] else None, None


_OP = registry.register("test_registry_affine", "(Tensor x, Tensor factor, float shift) -> Tensor", _implementation,
                        lambda x, factor, shift: x.new_empty(x.shape[::-1]), setup_context=_setup, backward=_backward)
_REGISTERED = torch.ops.mwm.test_registry_affine.default


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list = []

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _no_calls() -> Iterator[None]:
    CALLS.clear()
    yield


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, generator=generator, requires_grad=True), torch.randn((), generator=generator, requires_grad=True)


def test_values_and_gradients_are_those_of_the_registered_op() -> None:
    found = []
    for function in (_OP, _REGISTERED):
        x, factor = _inputs()
        out = function(x, factor, 0.5)
        found.append([out, *torch.autograd.grad(out.square().sum(), (x, factor))])
    assert all(torch.equal(mine, other) for mine, other in zip(*found, strict=True))


def test_without_a_gradient_to_follow_there_is_no_node() -> None:
    x, factor = _inputs()
    assert _OP(x.detach(), factor.detach(), 0.5).grad_fn is None
    with torch.no_grad():
        assert not _OP(x, factor, 0.5).requires_grad


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, factor = _inputs()
    (grad,) = torch.autograd.grad(_OP(x.detach(), factor, 0.5).sum(), factor)
    assert torch.equal(grad, x.detach().sum())


def test_a_view_that_the_implementation_returns_may_be_written_to() -> None:
    x, factor = _inputs()
    out = _OP(x, factor, 0.5)
    out.relu_()
    out.sum().backward()
    assert torch.equal(x.grad, ((x * factor + 0.5) > 0) * factor)


def test_a_mode_sees_the_op() -> None:
    x, factor = (t.detach() for t in _inputs())
    with Watch() as watch:
        _OP(x, factor, 0.5)
    assert watch.seen[0] is _REGISTERED


def test_fake_tensors_never_reach_the_implementation() -> None:
    with FakeTensorMode():
        assert _OP(torch.empty(3, 4), torch.empty(()), 0.5).shape == (4, 3)
    assert not CALLS


def test_meta_tensors_never_reach_the_implementation() -> None:
    assert _OP(torch.empty(3, 4, device="meta"), torch.empty((), device="meta"), 0.5).shape == (4, 3)
    assert not CALLS


def test_a_subclass_of_tensor_goes_through_the_dispatcher() -> None:
    class Named(Tensor):
        pass

    x, factor = (t.detach() for t in _inputs())
    assert type(_OP(x.as_subclass(Named), factor, 0.5)) is Named


def test_transforms_and_compilers_see_one_op() -> None:
    x, factor = _inputs()
    wanted = torch.autograd.grad(_REGISTERED(x, factor, 0.5).sum(), x)[0]
    compiled = torch.compile(lambda x, factor: _OP(x, factor, 0.5).sum(), backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.autograd.grad(compiled(x, factor), x)[0], wanted)
