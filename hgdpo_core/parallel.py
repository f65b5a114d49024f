"""Threads: small computations side by side on a CPU, a pool for decoding, and writing beside the work."""

import contextvars
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import nn

T = TypeVar("T")

SMALL_PARAMETERS = 100_000_000  # above that one operation fills several cores, and several batches may not fit
MAX_LANES = 8  # Python itself runs in one of them at a time
MAX_THREADS = 16  # that decode and scale images


def count_lanes(module: nn.Module, device: str) -> int:
    """How many batches to put through `module` at once: torch's threads for a small one on a CPU, else 1."""
    small = sum(parameter.numel() for parameter in module.parameters()) < SMALL_PARAMETERS
    return min(torch.get_num_threads(), MAX_LANES) if device == "cpu" and small else 1


def side_by_side(jobs: Iterable[Callable[[], T]], lanes: int) -> Iterator[T]:
    """The jobs' results in their order; up to `lanes` jobs run at once, each with one of torch's threads.

    Jobs are taken from `jobs` as lanes become free, in the caller's thread. With one lane they run there too, one after
    the other, with all of torch's threads.
    """
    if lanes == 1:
        yield from (job() for job in jobs)
        return
    threads, waiting = torch.get_num_threads(), deque[Future[T]]()
    try:
        with ThreadPoolExecutor(lanes, "lane", torch.set_num_threads, (1,)) as executor:
            try:
                for job in jobs:
                    waiting.append(executor.submit(job))
                    if len(waiting) > lanes:  # one waits its turn, so that no lane stands still
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)  # what a lane sets, MKL takes for all threads


def threads() -> ThreadPoolExecutor:
    """This process's threads for work that lets go of the interpreter: decoding and scaling."""
    return _threads_of(os.getpid())


@cache
def _threads_of(pid: int) -> ThreadPoolExecutor:  # threads do not survive a fork
    return ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix=f"pictures-{pid}")


class Writer:
    """Runs one job at a time in a thread of its own. Leaving the `with` block waits for the last.

    A job's error is raised by the next `start`, before its job begins, or at the end of the block, there even where the
    block itself fails or is stopped: that error is then its context.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "writer")
        self._pending: Future[Any] | None = None

    def start(self, job: Callable[[], Any]) -> None:
        """Wait for the job before, then begin this one, under the caller's context variables."""
        self._finish()
        self._pending = self._executor.submit(contextvars.copy_context().run, job)

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        try:
            self._finish()
        finally:
            self._executor.shutdown()
