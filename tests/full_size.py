"""What the tests on models of full size share."""

import gc
import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def measured(what: str) -> Iterator[None]:
    """Log what a piece took: seconds by the clock and of the processor, the largest memory meanwhile (macOS: so far).
    """
    gc.collect()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    start, used = time.monotonic(), time.process_time()
    yield
    seconds, used, status = time.monotonic() - start, time.process_time() - used, Path("/proc/self/status")
    if status.exists():
        peak = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    logging.info("%s: %.0f s, %.0f s of processor, peak memory %.2f GiB", what, seconds, used, peak / 2**30)
