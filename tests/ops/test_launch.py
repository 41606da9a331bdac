"""Launching a Triton kernel again: what is kept of the first launch, and when it may not be used."""

from __future__ import annotations

import importlib

import pytest
import torch

launch = importlib.import_module("mwm.kernels.launch")


class Compiled:
    """What Triton returns of a launch: called with every parameter in order."""

    def __init__(self, calls: list) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple) -> object:
        return lambda *args: self.calls.append(("again", grid, args))


class Kernel:
    arg_names = ("x", "out", "rows", "FLAG", "BLOCK")

    def __init__(self, compiled: bool = True) -> None:
        self.calls: list = []
        self.compiled = Compiled(self.calls) if compiled else None

    def __getitem__(self, grid: tuple) -> object:
        def run(*args: object, **kwargs: object) -> Compiled | None:
            self.calls.append(("first", grid, args, kwargs))
            return self.compiled

        return run


def _launcher(kernel: Kernel) -> object:
    return launch.Launcher(kernel, lambda rows, flag: ((rows // 2,), {"BLOCK": 16, "FLAG": flag, "rows": rows}, {"num_warps": 4}))


def test_the_second_launch_of_a_key_hands_over_every_parameter_in_the_kernels_order() -> None:
    kernel, x, out = Kernel(), torch.zeros(8), torch.zeros(8)
    run = _launcher(kernel)
    for _ in range(3):
        assert run((x, out), (6, True)) is kernel.compiled
    first, *rest = kernel.calls
    assert first == ("first", (3,), (x, out), {"rows": 6, "FLAG": True, "BLOCK": 16, "num_warps": 4})
    assert rest == [("again", (3, 1, 1), (x, out, 6, True, 16))] * 2


def test_another_key_or_a_pointer_that_is_not_aligned_goes_through_triton() -> None:
    """Triton compiles alignment in: code for aligned pointers must not get another."""
    kernel, x = Kernel(), torch.zeros(9)
    run = _launcher(kernel)
    run((x, x), (6, True))
    run((x, x), (6, False))
    run((x, x[1:]), (6, True))
    run((x[1:], x), (8, True))
    run((x, x), (8, True))
    assert [call[0] for call in kernel.calls] == ["first"] * 5
    run((x, x), (8, True))
    assert kernel.calls[-1][0] == "again"


def test_the_interpreter_has_nothing_to_keep() -> None:
    kernel, x = Kernel(compiled=False), torch.zeros(8)
    run = _launcher(kernel)
    assert run((x, x), (6, True)) is None and run((x, x), (6, True)) is None
    assert [call[0] for call in kernel.calls] == ["first"] * 2


def test_shapes_that_change_with_every_batch_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST", 4)
    run, x = _launcher(Kernel()), torch.zeros(8)
    for rows in range(2, 40):
        run((x, x), (rows, True))
    assert len(run.ready) <= 4
