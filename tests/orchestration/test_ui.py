"""What stages show in the Prefect UI."""

import json

import pytest
from prefect.client.orchestration import get_client

from hgdpo_core.scorers import SCORERS
from tasks.ui import artifact_key, show_table, show_text, stage_progress


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


def artifacts():
    with get_client(sync_client=True) as client:
        return {artifact.key: artifact for artifact in client.read_artifacts()}


def test_fractions_of_a_table_are_short(server):
    show_table("rates", [{"rate": 1 / 6, "wins": 123456, "loss": 1.5e-07 / 7, "who": "clip", "none": None}], "Rates")
    with get_client(sync_client=True) as client:
        table = next(artifact.data for artifact in client.read_artifacts() if artifact.key == "rates")
    assert json.loads(str(table)) == [
        {"rate": 0.1667, "wins": 123456, "loss": 2.143e-08, "who": "clip", "none": None}]
