"""The parts of Prefect that have no public way: all that this project uses of them.

There is no public call that starts a server and ends it again, nor one that sends the events that wait. A new minor
version of Prefect may move both: tests/orchestration/test_prefect_internals.py tests what is expected of them, and
that no other file reaches into Prefect.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogHandler
from prefect.server.api.server import SubprocessASGIServer

DRAIN_SECONDS = 10


@contextmanager
def temporary_server(seconds: int) -> Iterator[str]:
    """The API address of a server on this machine that ends with the block; RuntimeError if it takes longer to start.

    At the end it is left to the caller to `send_all` first: what waits afterwards has no server.
    """
    server = SubprocessASGIServer()
    try:
        server.start(timeout=seconds)
        yield server.api_url
    finally:
        server.stop()


def send_all() -> None:
    """Send the logs and events that wait, at most `DRAIN_SECONDS`; without it Prefect tries for a minute at the end."""
    APILogHandler().flush()
    EventsWorker.drain_all(timeout=DRAIN_SECONDS)
