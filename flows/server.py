"""Flows started by a command, on a Prefect server for one run where none is configured."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect import Flow
from prefect.events.worker import EventsWorker
from prefect.exceptions import CancelledRun
from prefect.logging.handlers import APILogWorker
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from hgdpo_core.errors import StoppedError

START_SECONDS = 60
DRAIN_SECONDS = 10


def call_flow(flow: Flow[..., Any], **parameters: Any) -> Any:
    """What the flow returns, run in this process; StoppedError where somebody cancelled it in the UI."""
    try:
        with some_server():
            return flow(**parameters)
    except CancelledRun:
        raise StoppedError("cancelled") from None


@contextmanager
def some_server() -> Iterator[None]:
    """The configured server; without one, a temporary server that ends with the block.

    Prefect starts one by itself too, but with an empty PREFECT_API_URL (which `make` sets to keep the user's own
    server out) its events worker takes the empty text for an address and fails for every event.
    """
    if get_current_settings().api.url:
        yield
        return
    server = SubprocessASGIServer()
    server.start(timeout=START_SECONDS)
    try:
        with temporary_settings({PREFECT_API_URL: server.api_url}):
            try:
                yield
            finally:
                for worker in (APILogWorker, EventsWorker):  # else they try for a minute to reach a server that is gone
                    worker.drain_all(timeout=DRAIN_SECONDS)
    finally:
        server.stop()
