"""A stream of images through threads that decode, a model that takes batches of one size, and threads that write; bounded at every joint."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def read_ahead(items: Iterable[Item], read: Callable[[Item], Made], *, workers: int, ahead: int) -> Generator[tuple[Item, Made | Exception], None, None]:
    """Apply a function to items in threads, in order, never more than `ahead` results early.

    Args:
        items: What to read.
        read: Called in a thread; with no workers, in this one.
        workers: Threads.
        ahead: Results that may wait, or be in the making, at a time.

    Yields:
        Each item with its result, or with the exception that reading it raised.
    """
    if workers < 1:
        for item in items:
            try:
                result: Made | Exception = read(item)
            except Exception as error:
                result = error
            yield item, result
        return
    waiting: deque[tuple[Item, Future[Made]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="read")
    try:
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) >= max(ahead, 1):
                yield _outcome(*waiting.popleft())
        while waiting:
            yield _outcome(*waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _outcome(item: Item, future: Future[Made]) -> tuple[Item, Made | Exception]:
    try:
        return item, future.result()
    except Exception as error:
        return item, error


class Batches(Generic[Item]):
    """Collects items of one kind until a batch of them is full, and never holds more than two batches in all.

    Args:
        size: Items of a batch.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._kinds: dict[Hashable, list[Item]] = {}
        self._held = 0

    def add(self, kind: Hashable, item: Item) -> list[Item] | None:
        """Keep an item; hands over a batch where one is full, or the largest where too many wait."""
        group = self._kinds.setdefault(kind, [])
        group.append(item)
        self._held += 1
        if len(group) >= self.size:
            return self._take(kind)
        if self._held >= 2 * self.size:
            return self._take(max(self._kinds, key=lambda known: len(self._kinds[known])))
        return None

    def rest(self) -> Iterator[list[Item]]:
        """What is left, batch by batch."""
        for kind in list(self._kinds):
            yield self._take(kind)

    def _take(self, kind: Hashable) -> list[Item]:
        group = self._kinds.pop(kind)
        self._held -= len(group)
        return group


class Behind:
    """Work that is done in threads after the model, at most `most` pieces at a time; results come back in this thread, in order.

    Args:
        done: Called in this thread with what each piece of work returned. An exception of the work is raised here.
        workers: Threads; with none the work is done at once.
        most: Pieces that may wait.
    """

    def __init__(self, done: Callable[[Any], None], *, workers: int = 1, most: int = 16) -> None:
        self._done, self._most = done, most
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="write") if workers else None
        self._waiting: deque[Future[Any]] = deque()

    def submit(self, work: Callable[[], Any]) -> None:
        """Hand over work, waiting where too much is undone."""
        if self._pool is None:
            self._done(work())
            return
        self._waiting.append(self._pool.submit(work))
        while self._waiting and (len(self._waiting) > self._most or self._waiting[0].done()):
            self._done(self._waiting.popleft().result())

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Finish what was handed over; on the way out of another exception, without raising a second one."""
        failed: BaseException | None = None
        while self._waiting:
            try:
                self._done(self._waiting.popleft().result())
            except Exception as late:
                failed = failed or late
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        if failed is not None and error is None:
            raise failed
