"""Threads: small computations in parallel on a CPU, a pool for decoding, and writing in the background."""

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
MAX_THREADS = 8  # Python itself runs in one thread at a time
MAX_THREADS = 16  # that decode and scale images


def count_threads(module: nn.Module, device: str) -> int:
    """How many batches to put through `module` in parallel: torch's threads for a small one on a CPU, else 1."""
    small = sum(parameter.numel() for parameter in module.parameters()) < SMALL_PARAMETERS
    return min(torch.get_num_threads(), MAX_THREADS) if device == "cpu" and small else 1


def parallel_map(jobs: Iterable[Callable[[], T]], parallel: int) -> Iterator[T]:
    """The jobs' results in their order; up to `parallel` jobs run at once, each with one of torch's threads.

    Jobs are taken from `jobs` as threads become free, in the caller's thread. With one they run there too, one after
    the other, with all of torch's threads.
    """
    if parallel == 1:
        yield from (job() for job in jobs)
        return
    threads, waiting = torch.get_num_threads(), deque[Future[T]]()
    try:
        with ThreadPoolExecutor(parallel, "parallel", torch.set_num_threads, (1,)) as executor:
            try:
                for job in jobs:
                    waiting.append(executor.submit(job))
                    if len(waiting) > parallel:  # one waits, so that no thread is idle
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)  # what one thread sets, MKL applies to all


def threads() -> ThreadPoolExecutor:
    """This process's threads for work that releases the interpreter: decoding and scaling."""
    return _threads_of(os.getpid())


@cache
def _threads_of(pid: int) -> ThreadPoolExecutor:  # threads do not survive a fork
    return ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix=f"images-{pid}")


class Writer:
    """Runs one job at a time in a thread of its own. Leaving the `with` block waits for the last.

    A job's error is raised by the next `start`, before its job begins, or at the end of the block, there even where the
    block itself fails or is stopped: that error is then its context.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "writer")
        self._pending: Future[Any] | None = None

    def start(self, job: Callable[[], Any]) -> None:
        """Wait for the previous job, then begin this one, under the caller's context variables."""
        self.finish()
        self._pending = self._executor.submit(contextvars.copy_context().run, job)

    def finish(self) -> None:
        """Wait for the job, and raise its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        try:
            self.finish()
        finally:
            self._executor.shutdown()
