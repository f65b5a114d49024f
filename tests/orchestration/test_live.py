"""What the live tests themselves rest on: an error in a server's log is seen, a known one is not."""

import live

KNOWN = """16:48:40.849 | ERROR   | prefect.server.api.workers - Worker channel setup failed due to a transient server \
error: work_pool=hgdpo-train
Traceback (most recent call last):
  File "prefect/server/api/workers.py", line 1118, in worker_channel_connect
sqlite3.OperationalError: database is locked
"""
POOL = """00:49:06.517 | ERROR   | docket.worker - cancel_child_task_runs(UUID('01a21f9c'))
Traceback (most recent call last):
sqlalchemy.exc.TimeoutError: QueuePool limit of size 5 overflow 10 reached, connection timed out, timeout 30.00
"""
REPEATED = """04:08:28.241 | ERROR   | prefect.server.events.services.event_persister - Max flush retries (5) reached, \
dropping 25 events
Traceback (most recent call last):
sqlite3.IntegrityError: NOT NULL constraint failed: events.occurred
"""
SCHEDULER = """16:49:01.120 | ERROR   | prefect.server.services.scheduler - Can't evaluate bulk DML statement
Traceback (most recent call last):
sqlalchemy.exc.CompileError: no
"""


def test_an_error_is_reported_with_its_traceback_and_a_known_one_is_not():
    start = "Check out the dashboard\n16:48:39.100 | WARNING | prefect - an ERROR in a text\n"
    log = start + KNOWN + SCHEDULER + POOL + REPEATED + KNOWN
    assert live.unknown_errors(log) == [SCHEDULER.strip()]


def test_an_error_of_the_web_server_is_seen():
    log = "ERROR:    [Errno 98] address already in use\nINFO:     bye\n"
    assert live.unknown_errors(log) == ["ERROR:    [Errno 98] address already in use"]


def test_a_known_error_hides_no_other_one_after_it():
    log = f"{SCHEDULER}{KNOWN}"
    assert live.unknown_errors(log) == [SCHEDULER.strip()]
