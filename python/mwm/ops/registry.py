"""One way for every op to enter ``torch.library``: schema, implementation, fake, derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("mwm", "FRAGMENT")
_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def register(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Register ``mwm::name`` and return a function that calls it.

    The implementation allocates the outputs, picks the backend and runs it; it is the same for every device, so that
    automatic choice never happens while a compiler traces. `define` + `impl` costs half of what `custom_op` does per call,
    and the function goes past the dispatcher where nobody listens there: 60 to 100 µs less per call on a busy host.

    Args:
        name: Name of the op inside the namespace ``mwm``.
        schema: Arguments and results, e.g. ``"(Tensor x, str backend) -> Tensor"``. A new argument comes last and has a default:
            compilers keep calls of before on disk.
        implementation: Runs the op on real tensors.
        fake: Returns empty outputs of the same shape, dtype and strides.
        setup_context: Saves what `backward` needs, as in ``torch.library.register_autograd``.
        backward: The derivative; None for ops on integers.
    """
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mwm::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"mwm::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    op = getattr(torch.ops.mwm, name).default
    count = len(op._schema.arguments)
    direct = None if backward is None else _differentiable(name, implementation, setup_context, backward)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or len(args) != count or not eager(args):
            return op(*args)
        if torch.is_grad_enabled() and any(isinstance(value, torch.Tensor) and value.requires_grad for value in args):
            return op(*args) if direct is None else direct.apply(*args)
        return implementation(*args)

    return call


def eager(args: tuple) -> bool:
    """Whether these are plain tensors with values, and nothing watches the dispatcher: no mode (fake tensors, tracers, counters), no transform, no tracing."""
    watched = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None
    return not watched and all((type(value) in _PLAIN and (value.is_cuda or value.is_cpu)) or not isinstance(value, torch.Tensor) for value in args)


def _differentiable(name: str, implementation: Callable, setup_context: Callable | None, backward: Callable) -> type[torch.autograd.Function]:
    """What `torch.library.register_autograd` makes, without the way through the dispatcher."""

    def forward(ctx: Any, *args: Any) -> Any:
        # What is returned as a view of something made inside is no view to autograd, so that an activation may write to it.
        with torch._C._ExcludeDispatchKeyGuard(_VIEWS):
            output = implementation(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    return type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


def once_only(name: str) -> Callable[..., Any]:
    """Derivative of a derivative op: raises, since a wrong second derivative must never be an outcome."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name}: a second derivative is not available. Do not use create_graph=True through it.")

    return backward
