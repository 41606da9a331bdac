"""One way for every op to enter ``torch.library``: schema, implementation, fake, derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("mwm", "FRAGMENT")


def register(
    name: str,
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Register ``mwm::name`` and return its callable overload.

    The implementation allocates the outputs, picks the backend and runs it; it is the same for every device, so that
    automatic choice never happens while a compiler traces. `define` + `impl` costs half of what `custom_op` does per call.

    Args:
        name: Name of the op inside the namespace ``mwm``.
        schema: Arguments and results, e.g. ``"(Tensor x, str backend) -> Tensor"``.
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
    return getattr(torch.ops.mwm, name).default


def once_only(name: str) -> Callable[..., Any]:
    """Derivative of a derivative op: raises, since a wrong second derivative must never be an outcome."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name}: a second derivative is not available. Do not use create_graph=True through it.")

    return backward
