"""Flows started by a command; where no Prefect server is configured, on a temporary one."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from prefect import Flow
from prefect.exceptions import Abort, CancelledRun
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from flows.prefect_internals import send_all, temporary_server
from hgdpo_core.errors import ConfigError, StoppedError, StorageError, first_line

START_SECONDS = 180  # on a machine that others fill with work; idle it takes ten
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


def call_flow(flow: Flow[..., Any], **parameters: Any) -> Any:
    """What the flow returns, run in this process; StoppedError where it was cancelled in the UI or given up.

    ConfigError when it is to use workers and no Prefect server is configured: a temporary one has none.
    """
    if parameters.get("shard_runner") == "deployment" and not get_current_settings().api.url:
        raise ConfigError("shard_runner is deployment, but no Prefect server is configured, so there are no workers: "
                          "start one with `make up` and set PREFECT_API_URL to its address, or leave shard_runner out")
    try:
        with some_server():
            return flow(**parameters)
    except CancelledRun:
        raise StoppedError("cancelled") from None
    except Abort as given_up:
        raise StoppedError(str(given_up)) from None


def _reach_this_machine() -> None:
    """Keep requests to servers on this machine from going through a web proxy."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host.strip() for host in given.split(",") if host.strip()]
    if "*" not in hosts:
        hosts += [host for host in THIS_MACHINE if host not in hosts]
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(hosts)


@contextmanager
def some_server() -> Iterator[None]:
    """The configured server; without one, a temporary server that ends with the block.

    Prefect starts one by itself too, but with an empty PREFECT_API_URL (which `make` sets to keep the user's own
    server out) its events worker takes the empty string for an address and fails for every event.
    """
    _reach_this_machine()
    if get_current_settings().api.url:
        yield
        return
    with ExitStack() as ends:
        try:
            url = ends.enter_context(temporary_server(START_SECONDS))
        except RuntimeError as error:
            raise StorageError(f"the temporary Prefect server on 127.0.0.1 did not answer within {START_SECONDS} s "
                               f"({first_line(error)}): try again, or start one and set PREFECT_API_URL") from None
        with temporary_settings({PREFECT_API_URL: url}):
            try:
                yield
            finally:
                send_all()
