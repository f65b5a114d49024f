"""One piece is written beside the work, in order, and no error of it is lost."""

import contextvars
import threading

import pytest

from hgdpo_core.errors import StoppedError, StorageError
from hgdpo_core.parallel import Writer

setting = contextvars.ContextVar("setting", default="outside")


def fail():
    raise StorageError("the store is full")


def test_jobs_run_beside_the_caller_one_at_a_time_in_order():
    seen, gate = [], threading.Event()

    def first():
        gate.wait(10)
        seen.append(threading.current_thread())

    with Writer() as writer:
        writer.start(first)
        assert seen == []  # the caller goes on while the job waits
        gate.set()
        writer.start(lambda: seen.append(2))
        assert seen[0] is not threading.current_thread()
    assert seen[1:] == [2]


def test_an_error_surfaces_before_the_next_job_begins():
    begun = []
    with pytest.raises(StorageError, match="full"), Writer() as writer:
        writer.start(fail)
        writer.start(lambda: begun.append(1))
    assert begun == []


def test_an_error_surfaces_at_the_end():
    with pytest.raises(StorageError, match="full"), Writer() as writer:
        writer.start(fail)


def test_a_stopped_block_waits_for_its_job_and_hides_no_error_of_it():
    done = []
    with pytest.raises(StoppedError), Writer() as writer:
        writer.start(lambda: done.append(1))
        raise StoppedError("stopped")
    assert done == [1]
    with pytest.raises(StorageError) as caught, Writer() as writer:
        writer.start(fail)
        raise StoppedError("stopped")
    assert isinstance(caught.value.__context__, StoppedError)


def test_a_job_sees_the_callers_context():
    seen = []
    with Writer() as writer:
        setting.set("inside")
        writer.start(lambda: seen.append(setting.get()))
    assert seen == ["inside"]
