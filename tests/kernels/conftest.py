"""Triton kernels against the oracle: on the CPU in Triton's interpreter, on a GPU compiled.

The interpreter must be chosen before triton is imported and would break inductor in the same process, so tests/test_interpreter.py runs this folder
in a process of its own with TRITON_INTERPRET=1. Without it the tests here need a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mwm.ops import gpu


def _scalars_are_indices() -> None:
    """numpy 2.4 refuses int() of an array of one element, which the interpreter of triton 3.6 takes for the bounds of a loop; 3.8 does as here."""
    from triton.runtime import interpreter

    before = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: object) -> None:
        before(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched


if gpu.interpreted() and not gpu.triton_missing():
    _scalars_are_indices()


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu)] if not gpu.interpreted() else ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Where Triton kernels run here; skips, with the reason, where they cannot."""
    if why := gpu.triton_missing():
        pytest.skip(f"{why}; tests/test_interpreter.py runs these tests on the CPU")
    return request.param


@pytest.fixture
def refused(device: str) -> Iterator[type[Exception]]:
    """The error by which a device-side assertion shows in the interpreter; on a GPU it would end the process's CUDA context."""
    if device != "cpu":
        pytest.skip("a failed device-side assertion makes the GPU unusable for the rest of the process")
    from triton.runtime.errors import InterpreterError
    from triton.runtime.interpreter import interpreter_builder

    before = interpreter_builder.options
    interpreter_builder.options = type(before)(**{**vars(before), "debug": True, "sanitize_overflow": False})
    yield InterpreterError
    interpreter_builder.options = before
