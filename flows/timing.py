"""Seconds by stage, for the summary and the report."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def timed(seconds: dict[str, float], stage: str, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Put how long the block took into `seconds[stage]`."""
    start = clock()
    yield
    seconds[stage] = round(clock() - start, 2)
