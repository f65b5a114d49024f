"""Flows as commands start them."""

import os
from urllib.request import proxy_bypass

import pytest
from prefect import flow
from prefect.states import Cancelled

from flows import cli
from flows.server import call_flow
from hgdpo_core.errors import StoppedError


@flow
def answer(value):
    return {"value": value}


@flow
def cancelled():
    return Cancelled(message="cancelled in the UI")


def test_a_flow_gives_its_result_and_a_cancelled_one_a_stop(server):
    assert call_flow(answer, value=3) == {"value": 3}
    with pytest.raises(StoppedError, match="cancelled"):
        call_flow(cancelled)


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
