"""The native loops under fork, spawn, threads, and each kind of thread runtime."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator

import harness
import pytest
import torch
from loader_masks import Masks, draw, report_runtime
from torch.utils.data import DataLoader

from mwm import _core


@pytest.fixture(params=["openmp", "pool", "inline"])
def runtime(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _core.thread_runtime().split()[0]
    if not _core.set_thread_runtime(request.param):
        pytest.skip(f"no {request.param} runtime is loaded")
    yield request.param
    _core.set_thread_runtime(before)


def test_torchs_own_openmp_runtime_is_found() -> None:
    assert _core.thread_runtime().startswith("openmp (")
    assert "torch" in _core.thread_runtime()
    assert not _core.set_thread_runtime("no such runtime")


def test_every_runtime_and_thread_count_gives_the_same_masks(runtime: str) -> None:
    with harness.num_threads(1):
        expected = draw(torch.arange(3000))
    for count in (2, 3, 5, 8):
        with harness.num_threads(count):
            for _ in range(20):
                assert torch.equal(draw(torch.arange(3000)), expected)


def test_calls_from_several_python_threads_are_safe(runtime: str) -> None:
    expected = draw(torch.arange(2000))
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(30):
            if not torch.equal(draw(torch.arange(2000)), expected):
                wrong.append(number)

    with harness.num_threads(2):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_loader_workers_draw_the_same_masks(method: str, threads: int) -> None:
    """The parent has used its threads before; a forked worker that touched them would hang until the timeout."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"{method} is not available on this system")
    with harness.num_threads(2):
        expected = [draw(torch.arange(1000 * i, 1000 * i + 500)) for i in range(8)]
        torch.randn(300, 300) @ torch.randn(300, 300)
    loader = DataLoader(Masks(threads), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=100)
    found = list(loader)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_runs_inline_and_its_parent_goes_on() -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("fork is not available on this system")
    with harness.num_threads(2):
        draw(torch.arange(2000))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=report_runtime, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == "inline"
    process.join(60)
    assert process.exitcode == 0
    assert _core.thread_runtime().startswith("openmp")
