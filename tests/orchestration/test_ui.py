"""What stages show in the Prefect UI."""

import contextlib
import json

import httpx
import pytest
from prefect.client.orchestration import get_client

from hgdpo_core.scorers import SCORERS
from tasks.ui import LiveTable, artifact_key, show_table, show_text, stage_progress


@pytest.mark.parametrize("stage", [*SCORERS, "LoRA weight 0.25"])
def test_every_stage_has_a_key_that_prefect_takes(server, stage):
    with stage_progress(stage) as progress:
        progress(1, 2, "images")
        progress(2, 2, "images")
        assert artifacts()[artifact_key(f"{stage}-progress")].data == 100.0
    show_text(f"note on {stage}", "all is well", "A note")
    assert artifacts()[artifact_key(f"note on {stage}")].description == "A note"
    assert artifact_key(f"{stage}-progress") not in artifacts()  # a full bar would bury the results


def test_the_bar_of_a_stage_that_failed_stays(server):
    with pytest.raises(ValueError, match="broken"), stage_progress("breaks") as progress:
        progress(1, 4, "images")
        raise ValueError("broken")
    assert artifacts()["breaks-progress"].description == "breaks: 4 images"


def test_a_server_that_takes_no_artifact_does_not_fail_the_work(server, monkeypatch, caplog):
    class Refusing:
        def __getattr__(self, name):
            raise httpx.ReadTimeout("busy")

    @contextlib.contextmanager
    def refuse(*_, **__):
        yield Refusing()

    def refused(*_, **__):
        raise httpx.HTTPStatusError("503", request=httpx.Request("POST", "http://a"), response=httpx.Response(503))

    for name in ("create_progress_artifact", "create_table_artifact", "create_markdown_artifact"):
        monkeypatch.setattr(f"tasks.ui.{name}", refused)
    done, table = [], LiveTable("runs", "Runs")
    with stage_progress("refused") as progress:
        for number in (1, 2):
            progress(number, 2, "images")
            done.append(number)
    show_table("refused-rows", [{"a": 1}], "rows")
    show_text("refused-text", "text", "text")
    table.show([{"a": 1}], at_once=True)
    monkeypatch.undo()
    table.show([{"a": 2}], at_once=True)  # created now
    assert done == [1, 2] and "runs" in artifacts() and "refused-progress" not in artifacts()
    with stage_progress("half") as progress:
        progress(1, 2, "images")
        monkeypatch.setattr("tasks.ui.get_client", refuse)
        monkeypatch.setattr("tasks.ui.update_progress_artifact", refused)
        progress(2, 2, "images")
        table.show([{"a": 3}], at_once=True)
    monkeypatch.undo()
    assert caplog.text.count("the Prefect UI lacks an artifact") == 7


def artifacts():
    with get_client(sync_client=True) as client:
        return {artifact.key: artifact for artifact in client.read_artifacts()}


def test_fractions_of_a_table_are_short(server):
    show_table("rates", [{"rate": 1 / 6, "wins": 123456, "loss": 1.5e-07 / 7, "who": "clip", "none": None}], "Rates")
    with get_client(sync_client=True) as client:
        table = next(artifact.data for artifact in client.read_artifacts() if artifact.key == "rates")
    assert json.loads(str(table)) == [
        {"rate": 0.1667, "wins": 123456, "loss": 2.143e-08, "who": "clip", "none": None}]
