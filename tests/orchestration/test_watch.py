"""A run asks whether it should stop, and ends in the state that fits the answer."""

from types import SimpleNamespace
from uuid import UUID, uuid4

import pytest
from prefect.exceptions import Abort
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Failed, Running, Scheduled

from flows.watch import RunWatch, answer_stop
from hgdpo_core.errors import StoppedError

RUN, PARENT = uuid4(), uuid4()


class Server:
    """Answers with the runs as the test sets them; an exception is raised."""

    def __init__(self):
        self.runs = {RUN: (Running(), 1), PARENT: (Running(), 1)}

    def read(self, run_id: UUID):
        if isinstance(self.runs, Exception):
            raise self.runs
        state, count = self.runs[run_id]
        return SimpleNamespace(state=state, run_count=count)


@pytest.fixture
def server():
    return Server()


def asked(server, *, before=None):
    run_watch = RunWatch(server.read, RUN, PARENT)
    if before is not None:
        now, server.runs = server.runs, before
        run_watch.ask()
        server.runs = now
    run_watch.ask()
    return run_watch


def test_a_running_run_goes_on(server):
    assert not asked(server)()


@pytest.mark.parametrize("state", [Crashed(), Failed(), Completed(), Scheduled(), Cancelled()])
def test_a_run_that_the_server_gave_up_leaves_silently(server, state):
    server.runs[RUN] = (state, 1)
    stopped = asked(server)
    assert stopped() and stopped.superseded and not stopped.cancelled


def test_a_second_attempt_elsewhere_stops_the_first(server):
    first = dict(server.runs)
    server.runs[RUN] = (Running(), 2)
    assert asked(server, before=first).superseded
    assert not asked(server)()  # the second attempt itself


@pytest.mark.parametrize("state", [Cancelling(), Cancelled()])
def test_a_cancelled_parent_stops_its_child(server, state):
    server.runs[PARENT] = (state, 1)
    stopped = asked(server)
    assert stopped() and stopped.cancelled and not stopped.superseded


@pytest.mark.parametrize("state", [Crashed(), Failed()])
def test_a_parent_that_only_died_does_not(server, state):
    server.runs[PARENT] = (state, 1)
    assert not asked(server)()


def test_without_an_answer_the_work_goes_on(server):
    first, server.runs = server.runs, ConnectionError("the server is restarting")
    run_watch = asked(server, before=first)
    assert not run_watch()
    server.runs = first
    run_watch.ask()
    assert not run_watch()


def test_how_a_stopped_attempt_ends(server):
    error = StoppedError("stopped while generating")
    with pytest.raises(StoppedError, match="while generating"):
        answer_stop(asked(server), error)
    server.runs[RUN] = (Cancelling(), 1)
    assert answer_stop(asked(server), error).is_cancelled()

    server.runs[RUN] = (Crashed(), 1)
    with pytest.raises(Abort, match="started again elsewhere"):  # an Exception would be reported as Failed
        answer_stop(asked(server), error)
    assert not issubclass(Abort, Exception)
