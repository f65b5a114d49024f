"""A run that may outlive its own record: killed and retried elsewhere, cancelled, or the child of a cancelled parent.

Prefect does not notify a process that its run was marked Crashed and started again. So the run asks, and stops.
"""

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import Abort
from prefect.logging import get_logger
from prefect.runtime import flow_run as this_flow_run
from prefect.states import Cancelled, State

from hgdpo_core.errors import StoppedError

CHECK_SECONDS = 10.0
ENDING = {StateType.CANCELLING, StateType.CANCELLED}

ReadRun = Callable[[UUID], FlowRun]
logger = get_logger("hgdpo.watch")


class RunWatch:
    """Whether this attempt should stop; a `should_stop` that costs nothing to call.

    A thread asks the server, so that a server that is slow or down never delays the work: without an answer the work
    continues.
    """

    def __init__(self, read: ReadRun, run_id: UUID, parent_id: UUID | None = None):
        self._read, self._run_id, self._parent_id = read, run_id, parent_id
        self._attempt: int | None = None
        self.cancelled = False
        """The run or its parent was cancelled: stop as Cancelled."""
        self.superseded = False
        """The server has given this run up, perhaps started it again elsewhere: stop without reporting a state."""

    def __call__(self) -> bool:
        return self.cancelled or self.superseded

    def ask(self) -> None:
        """Read the run and its parent once."""
        try:
            run = self._read(self._run_id)
            parent = self._read(self._parent_id) if self._parent_id is not None else None
        except Exception as error:  # whatever the reason for no answer, the work itself may continue
            logger.debug("the server did not say whether %s is still needed: %s", self._run_id, error)
            return
        if self._attempt is None:
            self._attempt = run.run_count
        state = run.state.type if run.state else None
        if state == StateType.CANCELLING or (parent and parent.state and parent.state.type in ENDING):
            self.cancelled = True
        elif state != StateType.RUNNING or run.run_count != self._attempt:
            self.superseded = True


@contextmanager
def watch_this_run(seconds: float = CHECK_SECONDS) -> Iterator[RunWatch]:
    """A watch over the current flow run, asking every `seconds`."""
    parent = this_flow_run.parent_flow_run_id
    with get_client(sync_client=True) as client:
        watch = RunWatch(client.read_flow_run, UUID(this_flow_run.id), UUID(parent) if parent else None)
        watch.ask()
        ended = threading.Event()

        def keep_asking() -> None:
            while not ended.wait(seconds):
                watch.ask()

        # The thread gets this run's settings, or it would ask another server.
        thread = threading.Thread(target=contextvars.copy_context().run, args=(keep_asking,), daemon=True)
        thread.start()
        try:
            yield watch
        finally:
            ended.set()
            thread.join(timeout=seconds)


def answer_stop(watch: RunWatch, error: StoppedError) -> State[Any]:
    """How a stopped attempt ends: Cancelled if it was, without a state if the run is no longer its own, else the error.

    A state that it reported now would overwrite that of the newer attempt. On Abort, which Prefect raises itself where
    its server takes a run away, it reports none, and the worker takes the process's end for no crash.
    """
    if watch.superseded:
        logger.warning("given up by the server or started again elsewhere: leaving the run to the newer attempt")
        raise Abort("given up by the Prefect server, or started again elsewhere")
    if watch.cancelled:
        return Cancelled(message="The run or its parent was cancelled; finished shards are kept.")
    raise error
