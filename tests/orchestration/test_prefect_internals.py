"""What this project takes from inside Prefect: in one file, and still as that file expects it."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flows import prefect_internals

ROOT = Path(__file__).parents[2]
PRIVATE = re.compile(r"prefect\.server\.|prefect\._internal|prefect\.events\.worker|APILogWorker|os\._exit")
ALLOWED = ROOT / "flows" / "prefect_internals.py"
SENDS = """
import httpx
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.events import emit_event
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_API_URL, temporary_settings
from flows.prefect_internals import send_all, temporary_server

@flow
def speak():
    get_run_logger().info("a log that waits")
    emit_event(event="hgdpo.test", resource={"prefect.resource.id": "hgdpo.test"})

with temporary_server(300) as url:
    with temporary_settings({PREFECT_API_URL: url}):
        speak()
        send_all()
        logs = httpx.post(f"{url}/logs/filter", json={}, timeout=60).json()
        assert "a log that waits" in [log["message"] for log in logs], logs
try:
    httpx.get(f"{url}/health")
except httpx.ConnectError:
    print("sent, and the server is gone")
"""


def test_no_other_file_reaches_into_prefect():
    files = [path for folder in ("hgdpo_core", "tasks", "flows", "deployments", "benchmarks")
             for path in (ROOT / folder).rglob("*.py") if path != ALLOWED]
    assert len(files) > 100
    assert not [path.relative_to(ROOT) for path in files if PRIVATE.search(path.read_text())]
    assert PRIVATE.search(ALLOWED.read_text())


def test_prefect_still_has_what_is_used():
    """The first to fail with a new version of Prefect; each line says what then no longer works."""
    server, worker = prefect_internals.SubprocessASGIServer, prefect_internals.EventsWorker
    assert "timeout" in inspect.signature(server.start).parameters, "a run without a server cannot start one"
    assert isinstance(inspect.getattr_static(server, "api_url"), property), "... nor find it"
    assert callable(server.stop), "... nor end it"
    assert "timeout" in inspect.signature(worker.drain_all).parameters, \
        "events that wait when a command ends are lost, after a minute of trying"


def test_logs_are_sent_before_the_server_ends(tmp_path, monkeypatch):
    for name in ("PREFECT_API_URL", "PREFECT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", SENDS], cwd=ROOT, text=True, capture_output=True)
    assert "sent, and the server is gone" in done.stdout, done.stderr
    assert "EventsWorker" not in done.stderr and "Error logging to API" not in done.stderr


def test_a_server_that_does_not_start_in_time_is_ended(monkeypatch):
    ended = []

    class Slow:
        def start(self, timeout):
            raise RuntimeError(f"not within {timeout}")

        def stop(self):
            ended.append(True)

    monkeypatch.setattr(prefect_internals, "SubprocessASGIServer", Slow)
    with pytest.raises(RuntimeError, match="not within 3"), prefect_internals.temporary_server(3):
        pass
    assert ended
