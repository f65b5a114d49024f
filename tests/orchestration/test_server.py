"""Flows as commands start them."""

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
    return Cancelled(message="somebody pressed Cancel")


def test_a_flow_gives_its_result_and_a_cancelled_one_a_stop(server):
    assert call_flow(answer, value=3) == {"value": 3}
    with pytest.raises(StoppedError, match="cancelled"):
        call_flow(cancelled)


@pytest.mark.parametrize(("error", "word"), [
    (StoppedError("cancelled"), "cancelled"), (KeyboardInterrupt(), "stopped")])
def test_a_stop_is_one_line_that_says_how_to_go_on(monkeypatch, capsys, error, word):
    def stop(*_, **__):
        raise error

    monkeypatch.setattr("hgdpo_core.run.open_run", stop)
    assert cli.main(["run"]) == 130
    assert capsys.readouterr().err == (f"hgdpo: {word}; what is finished is kept, run the same command to go on\n")
