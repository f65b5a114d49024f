"""Threads: small computations in parallel on a CPU, a pool for decoding, reading ahead and writing beside the work."""

import contextvars
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cache
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import nn

S = TypeVar("S")
T = TypeVar("T")

SMALL_PARAMETERS = 100_000_000  # above that one operation fills several cores, and several batches may not fit
MAX_THREADS = 8  # Python itself runs in one thread at a time
IMAGE_THREADS = 16  # that decode and scale images


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
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(parallel, "parallel", torch.set_num_threads, (1,)) as executor:
            yield from _in_order(map(executor.submit, jobs), parallel + 1)  # one waits, so that no thread is idle
    finally:
        torch.set_num_threads(threads)  # what one thread sets, MKL applies to all


def _in_order(futures: Iterable[Future[T]], limit: int) -> Iterator[T]:
    """Their results; at most `limit` are begun and not yet taken, and those never taken are cancelled."""
    waiting = deque[Future[T]]()
    try:
        for future in futures:
            waiting.append(future)
            if len(waiting) >= limit:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def threads() -> ThreadPoolExecutor:
    """This process's threads for work that releases the interpreter: decoding and scaling."""
    return _threads_of(os.getpid())


@cache
def _threads_of(pid: int) -> ThreadPoolExecutor:  # threads do not survive a fork
    return ThreadPoolExecutor(count_image_threads(), thread_name_prefix=f"images-{pid}")


def count_image_threads() -> int:
    """How many `threads` there are."""
    return min(IMAGE_THREADS, os.cpu_count() or 1)


def thread_map(function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """`function` of each item in their order, by `threads`; at most two for each thread are begun and not yet taken.

    Items are taken from `items` in the caller's thread, no earlier than needed. Not for use inside `function`.
    """
    return _in_order((threads().submit(function, item) for item in items), 2 * count_image_threads())


@contextmanager
def ahead(items: Generator[T], mark: object = None, depth: int = 1) -> Iterator[Iterator[T]]:
    """The items as they come, each made in a thread beside the caller's; at most `depth` are made, or in the making.

    An item that is `mark` does not count: the one after it is made too. `items` runs under the caller's context
    variables; its error is raised in place of the item. Leaving the block waits for the item in the making, if there is
    one, and closes `items`.
    """
    left, room, made = Event(), Semaphore(depth), SimpleQueue[Future[T] | None]()

    def make() -> None:
        with closing(items):
            while room.acquire() and not left.is_set():
                future = Future[T]()
                try:
                    item = next(items)
                    future.set_result(item)
                    if item is mark:
                        room.release()
                except StopIteration:
                    break
                except BaseException as error:
                    future.set_exception(error)
                made.put(future)
        made.put(None)

    def take() -> Iterator[T]:
        while (future := made.get()) is not None:
            item = future.result()
            if item is not mark:
                room.release()
            yield item

    thread = Thread(target=contextvars.copy_context().run, args=(make,), name="ahead")
    thread.start()
    try:
        yield take()
    finally:
        left.set()
        room.release()
        thread.join()


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
