"""Runs the jobs of a study in worker processes: regions first, then cells in their order; one that fails is tried once more, and never stops the others."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mwm.study.cell_files import Cell, locked, write_failure
from mwm.study.cells import make_regions, run_cell
from mwm.study.config import StudyConfig
from mwm.study.same_time import needed
from mwm.study.sources import arm

_TRIES = 2
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


@dataclass
class Job:
    """One piece of work.

    Attributes:
        name: for the progress line.
        cell: the cell, or None for regions that several cells wait for.
        regions: (data set, arm, fold) of the regions to make, or None.
        after: names of jobs that must have ended.
        tries: how often it has ended.
    """

    name: str
    cell: Cell | None = None
    regions: tuple[str, str, int] | None = None
    after: frozenset[str] = frozenset()
    tries: int = 0


@dataclass
class Outcome:
    """What became of the jobs: name -> error, None for those that succeeded; names that the time did not reach."""

    ended: dict[str, str | None] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    @property
    def failed(self) -> dict[str, str]:
        """Jobs that failed twice."""
        return {name: error for name, error in self.ended.items() if error is not None}


def jobs_of(cells: Sequence[Cell], config: StudyConfig) -> list[Job]:
    """Cells in their order; before the first that needs them, the regions that the arms of a fold share.

    A cell that comes again with tasks of a later block waits for its first part, and one that takes as long as another arm waits for that arm.
    """
    jobs, made = [], set()
    parts: dict[str, list[str]] = {}
    for cell in cells:
        kind, after = arm(cell.arm), {one.name for one in needed(cell)}
        if kind.pretrain and kind.source == "main" and config.source_of(cell.data).name != "masks":
            regions = f"regions {cell.data}/{cell.fold}"
            if regions not in made:
                made.add(regions)
                jobs.append(Job(regions, regions=(cell.data, "region", cell.fold)))
            after.add(regions)
        before = parts.setdefault(cell.name, [])
        name = f"{cell.name}:{'+'.join(cell.tasks)}" if before else cell.name
        jobs.append(Job(name, cell=cell, after=frozenset({*after, *before})))
        before.append(name)
    return jobs


def run_jobs(jobs: Sequence[Job], config: StudyConfig, out: Path, *, device: str, workers: int, threads: int, weights: str | None = None,
             until: float | None = None, say: Callable[[str], None] = print) -> Outcome:
    """Run jobs in processes of their own until all have ended or the time is over.

    Args:
        jobs: in order; the first one that waits for nothing goes next.
        config: of the study.
        out: its folder.
        device: of every worker.
        workers: how many at a time.
        threads: CPU threads of each worker.
        weights: file of ImageNet weights.
        until: `time.monotonic()` after which no job is begun; those in flight are ended and go on in the next call.
        say: takes one line per job that ends.
    """
    outcome, waiting, busy = Outcome(), list(jobs), {}
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    idle: list[_Worker] = []
    count = max(1, min(workers, len(waiting)))
    total = len(waiting)
    try:
        while waiting or busy:
            over = until is not None and time.monotonic() >= until
            while not over and len(busy) < count and (job := _next(waiting, {b[0].name for b in busy.values()})) is not None:
                worker = idle.pop() if idle else _Worker(context, config, out, device, threads, weights)
                worker.pipe.send(job)
                busy[worker] = (job, time.monotonic())
            if not busy or over:
                break
            wait([end for worker in busy for end in (worker.pipe, worker.process.sentinel)], timeout=None if until is None else max(0.1, until - time.monotonic()))
            for worker in [w for w in busy if w.pipe.poll() or not w.process.is_alive()]:
                job, began = busy.pop(worker)
                error = worker.answer()
                if worker.process.is_alive():
                    idle.append(worker)
                job.tries += 1
                if error is not None and job.tries < _TRIES:
                    say(f"again: {job.name}: {error}")
                    waiting.insert(0, job)
                    continue
                outcome.ended[job.name] = error
                if error is not None and job.cell is not None:
                    try:
                        write_failure(job.cell, config, out, error, weights)
                    except OSError as problem:  # such as a full disk, which must not end the cells that run
                        say(f"{job.name}: cell.json cannot be written: {_sentence(problem)}")
                say(f"{len(outcome.ended)}/{total} {job.name}: {'done' if error is None else f'FAILED: {error}'} ({time.monotonic() - began:.0f} s)")
        outcome.left = [job.name for job in waiting] + [job.name for job, _ in busy.values()]
        return outcome
    finally:
        for worker in [*idle, *busy]:
            worker.stop(at_once=worker in busy)


def _next(waiting: list[Job], running: set[str]) -> Job | None:
    """Take the first job that waits for nothing; one whose regions failed fails with them when it runs."""
    open_names = {job.name for job in waiting} | running
    for place, job in enumerate(waiting):
        if not job.after & open_names:
            return waiting.pop(place)
    return None


class _Worker:
    """A process that does one job after another and answers each with None or a sentence."""

    def __init__(self, context: Any, *settings: Any) -> None:
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, os.getpid(), *settings), daemon=False)
        self.process.start()
        other.close()

    def answer(self) -> str | None:
        """What the job in flight came to."""
        try:
            return self.pipe.recv() if self.pipe.poll() else self._died()
        except (EOFError, OSError):
            return self._died()

    def _died(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        return f"the worker process ended with {f'signal {-code}' if code is not None and code < 0 else f'exit code {code}'}, perhaps for want of memory; take fewer workers"

    def stop(self, *, at_once: bool) -> None:
        """End the process; what it had written stays."""
        try:
            self.pipe.send(None)
        except (OSError, ValueError):
            pass
        if at_once:
            self.process.terminate()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()


def _work(pipe: Connection, parent: int, config: StudyConfig, out: Path, device: str, threads: int, weights: str | None) -> None:
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    for name in _TORCHRUN:  # each cell is a run of one process, also where torchrun started the study
        os.environ.pop(name, None)
    import torch

    from mwm.train.heap import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        if job is None:
            return
        error = None
        try:
            with (out / "workers.log").open("a", encoding="utf-8") as log:
                error = _do(job, config, out, device, weights, log)
        except Exception as problem:  # a job must not take its worker along
            error = _sentence(problem)
        pipe.send(error)


def _follow(parent: int) -> None:
    """End with the study where that was killed: nobody waits for this process, and the next call would wait for its locks."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _do(job: Job, config: StudyConfig, out: Path, device: str, weights: str | None, log: Any) -> str | None:
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        print(f"== {job.name}", flush=True)
        try:
            if job.regions is not None:
                make_regions(config, out, *job.regions, device)
            else:
                with locked(out / "locks" / job.cell.name.replace("/", "-")):  # another call of the same study waits, and then finds the cell done
                    run_cell(job.cell, config, out, device, weights)
        except Exception as problem:
            traceback.print_exc()
            return _sentence(problem)
        finally:
            log.flush()
    return None


def _sentence(problem: Exception) -> str:
    """One line of an error; with its type, where it was not written for a reader."""
    lines = str(problem).splitlines() or [""]
    # A loader worker's error arrives with its traceback as text; the last line holds the message.
    words = lines[-1].partition(": ")[2] if lines[0].startswith("Caught ") and len(lines) > 1 else lines[0]
    return words if words and isinstance(problem, (ValueError, OSError)) else f"{type(problem).__name__}: {words}".rstrip(": ")
