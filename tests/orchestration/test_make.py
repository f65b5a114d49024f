"""`make demo` keeps the user's own Prefect out, whatever it is; a run without a server starts and ends its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOSTILE = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_API_KEY": "secret", "PREFECT_PROFILE": "missing",
           "PREFECT_HOME": "/nonexistent/prefect", "PREFECT_PROFILES_PATH": "/nonexistent/profiles.toml",
           "PREFECT_API_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:////nonexistent/old.db"}


def test_make_drops_every_prefect_variable_of_the_user(tmp_path):
    stub = tmp_path / "hgdpo"
    stub.write_text('#!/bin/sh\necho "arguments $*"\nenv | grep "^PREFECT_"\n')
    stub.chmod(0o755)
    printed = subprocess.run(["make", "-s", "-o", ".venv/.installed", "demo", f"BIN={tmp_path}"], cwd=ROOT, text=True,
                             env=os.environ | HOSTILE, capture_output=True, check=True).stdout.splitlines()
    assert printed[0] == "arguments run --preset figures --root output/demo --publish output/demo"
    variables = dict(line.split("=", 1) for line in printed[1:])
    assert variables["PREFECT_API_URL"] == ""
    assert variables["PREFECT_HOME"] == str(ROOT / ".prefect")
    assert variables["PREFECT_PROFILES_PATH"].startswith(str(ROOT / ".prefect"))
    assert not {"PREFECT_API_KEY", "PREFECT_PROFILE", "PREFECT_API_DATABASE_CONNECTION_URL"} & variables.keys()


def test_make_starts_the_slow_tests_over_when_asked_and_runs_them_offline(tmp_path):
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "$* offline=$HF_HUB_OFFLINE key=$PREFECT_API_KEY"\n')
    stub.chmod(0o755)
    command = ["make", "-s", "-o", ".venv/.installed", "test-slow", f"BIN={tmp_path}"]
    printed = [subprocess.run([*command, *more], cwd=ROOT, text=True, env=os.environ | HOSTILE, capture_output=True,
                              check=True).stdout for more in ([], ["FRESH=1"])]
    assert printed == ["tests/slow.py offline=1 key=\n", "tests/slow.py --fresh offline=1 key=\n"]


def test_a_run_with_an_empty_address_has_a_server_with_events_and_ends_it(tmp_path):
    code = """
import httpx
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.settings import PREFECT_API_URL
from flows.server import some_server

@flow
def talk():
    create_markdown_artifact("hello", key="hello")
    return PREFECT_API_URL.value()

with some_server():
    url = talk()
    assert httpx.get(f"{url}/health").json() is True
try:
    httpx.get(f"{url}/health")
except httpx.ConnectError:
    print("the server is gone")
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": "", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, env=environment)
    assert "the server is gone" in done.stdout, done.stderr
    assert "EventsWorker" not in done.stderr and "Error logging to API" not in done.stderr
