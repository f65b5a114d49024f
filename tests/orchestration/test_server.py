"""Flows as commands start them."""

import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from urllib.request import proxy_bypass
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.runtime import flow_run
from prefect.states import Cancelled, Crashed

from deployments.local import ROOT
from flows import cli, lifecycle
from flows import server as servers
from flows.lifecycle import run_watched
from flows.server import call_flow
from hgdpo_core.errors import ConfigError, StoppedError

ALONE = """
from flows.cli import _prepare_environment
_prepare_environment()
from prefect.settings import get_current_settings
settings = get_current_settings()
print(settings.server.analytics_enabled, settings.home, settings.profiles_path)
"""


@flow
def answer(value):
    return {"value": value}


@flow
def cancelled():
    return Cancelled(message="cancelled in the UI")


@flow
def superseded():
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(UUID(flow_run.id), Crashed(message="no heartbeat"), force=True)
    return run_watched(lambda watch: None)


def test_a_flow_gives_its_result_and_a_cancelled_one_a_stop(server):
    assert call_flow(answer, value=3) == {"value": 3}
    with pytest.raises(StoppedError, match="cancelled"):
        call_flow(cancelled)


def test_a_run_that_the_server_gave_up_leaves_the_state_alone(server):
    """A state of its own would overwrite that of a newer attempt."""
    with pytest.raises(StoppedError, match="given up by the Prefect server"):
        call_flow(superseded)
    with get_client(sync_client=True) as client:
        last, = client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=["superseded"])))
    assert last.state is not None and (last.state.name, last.state.message) == ("Crashed", "no heartbeat")


@pytest.mark.parametrize(("given", "expected"), [("", "127.0.0.1,localhost,::1"), ("*", "*"),
                                               ("corp.org, localhost", "corp.org,localhost,127.0.0.1,::1")])
def test_a_web_proxy_is_not_asked_for_this_machine(server, monkeypatch, given, expected):
    """It would be waited for, and then the error would not name it."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, given)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert call_flow(answer, value=3) == {"value": 3}
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == expected
    assert proxy_bypass("127.0.0.1") and not (given != "*" and proxy_bypass("example.org"))


@pytest.mark.parametrize(("error", "word"), [
    (StoppedError("cancelled"), "cancelled"), (KeyboardInterrupt(), "stopped")])
def test_a_stop_is_one_line_that_says_how_to_go_on(monkeypatch, capsys, error, word):
    def stop(*_, **__):
        raise error

    monkeypatch.setattr("hgdpo_core.run.open_run", stop)
    assert cli.main(["run"]) == 130
    assert capsys.readouterr().err == (f"hgdpo: {word}; what is finished is kept, run the same command to continue\n")


def test_an_error_of_no_kind_of_ours_is_one_line_that_names_a_log_with_the_traceback(monkeypatch, capsys, tmp_path):
    def fail(*_, **__):
        raise RuntimeError("Failed to reach the server\nat its address")

    monkeypatch.setattr("hgdpo_core.run.open_run", fail)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["run"]) == 1
    log, = (tmp_path / "hgdpo" / "logs").iterdir()
    assert capsys.readouterr().err == ("hgdpo: error: RuntimeError: Failed to reach the server; what is finished is "
                                       f"kept. The traceback is in {log}\n")
    assert "Traceback (most recent call last)" in log.read_text()


def test_without_a_server_of_the_user_their_prefect_home_stays_as_it_is(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "DO_NOT"))}
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, text=True, capture_output=True, env={
        **environment, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    home = tmp_path / "cache" / "hgdpo" / "prefect"
    assert done.stdout.split() == ["False", str(home), str(tmp_path / ".prefect" / "profiles.toml")]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_workers_without_a_server_are_one_line_at_once(monkeypatch):
    """A temporary server has no workers: the run would wait without end."""
    monkeypatch.setattr(servers, "get_current_settings", lambda: SimpleNamespace(api=SimpleNamespace(url=None)))
    with pytest.raises(ConfigError, match="no Prefect server is configured.*set PREFECT_API_URL"):
        call_flow(answer, shard_runner="deployment")


@pytest.mark.parametrize(("name", "value"), [("prompts", "prompts.txt"), ("prompts", "./prompts"), ("root", "output"),
                                             ("images", "here"), ("target", "mine.safetensors")])
def test_a_relative_path_is_refused_where_a_worker_would_look_it_up(tmp_path, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    lifecycle.refuse_relative_paths(**{name: value})    # not a run of a deployment: the user's own folder
    monkeypatch.setattr(lifecycle, "deployment", SimpleNamespace(id="some"))
    with pytest.raises(ConfigError, match=f"{name} is the relative path '{value}'.*absolute path"):
        lifecycle.refuse_relative_paths(**{name: value})
    for good in (None, "figures", "s3://bucket/prompts.txt", "/data/prompts.txt", "~/prompts.txt"):
        lifecycle.refuse_relative_paths(**{name: good})
    lifecycle.refuse_relative_paths(target="owner/name")


@pytest.mark.parametrize(("given", "kept"), [("lr-1e5", True), ("my run", True), ("beta-sweep", True),
                                             ("beta-2", True), ("clever-otter", False), ("rho2-napinne", False),
                                             ("phi12-canis-majoris-void", False)])
def test_a_typed_name_of_a_run_stays(monkeypatch, given, kept):
    """Prefect gives every other run a name of two words from its lists, its form one of a Greek letter and a star."""
    renamed = []
    client = SimpleNamespace(set_flow_run_name=lambda run_id, name: renamed.append(name))
    monkeypatch.setattr(lifecycle, "get_client", lambda sync_client: nullcontext(client))
    monkeypatch.setattr(lifecycle, "flow_run", SimpleNamespace(name=given, id=str(uuid4())))
    lifecycle.name_this_run("sd15", "s3://models/mine/", "sd15-0123")
    assert renamed == ([] if kept else ["sd15 mine sd15-0123"])
