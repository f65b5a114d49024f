"""The live tests on Postgres: the same files, on a server whose database is not SQLite."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.postgres import binaries, postgres
from deployments.local import _is_free

ROOT = Path(__file__).parents[2]
needs_postgres = pytest.mark.skipif(binaries() is None, reason="no Postgres here: apt-get install postgresql")


@needs_postgres
@pytest.mark.slow
@pytest.mark.parametrize("file", ["test_workers.py", "test_kills.py"])
def test_the_live_tests_pass_on_postgres(file):
    """All of a file, the slow ones too: workers, Retry, kills, the nightly run, the schedule, each automation."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "slow or not slow",
               str(ROOT / "tests" / "orchestration" / file)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HGDPO_TEST_DATABASE": "postgres"}, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout[-8000:]


@needs_postgres
def test_a_new_postgres_takes_prefects_tables_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
    with postgres() as url:
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {
            "PREFECT_API_DATABASE_CONNECTION_URL": url, "PREFECT_HOME": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        port = int(url.rpartition(":")[2].partition("/")[0])
        assert not _is_free(port)
        server, = [process for process in psutil.process_iter(["cmdline"]) if f"-p {port}" in " ".join(
            process.info["cmdline"] or []) and "-D" in process.info["cmdline"]]
        assert os.getsid(server.pid) == server.pid != os.getsid(0)  # Ctrl-C in a terminal is not for it
    assert _is_free(port)
