"""What a run makes is sent as assets: keys are URLs in the store, lineage from the pool to the evaluation."""

import pytest
from events import sent_events
from prefect import flow, task

from hgdpo_core.storage import Store
from tasks import assets
from tasks.assets import MATERIALIZED, REFERENCED, show_asset


def test_the_server_gets_the_asset_its_source_and_the_run(server, tmp_path):
    store = Store(f"file://{tmp_path}")

    @task
    def make():
        show_asset(store, "scores/n3-1/pick-2", "scores", ["pools/n3-1"], images=12, scorer="pickscore")

    @flow
    def assets_of_a_run():
        make()

    assets_of_a_run()
    event, = sent_events(MATERIALIZED, store.root)
    assert event["resource"] == {"prefect.resource.id": f"{store.root}/scores/n3-1/pick-2",
                                 "prefect.resource.name": "scores pick-2"}
    assert event["payload"] == {"images": 12, "scorer": "pickscore"}
    roles = {one["prefect.resource.role"]: one["prefect.resource.id"] for one in event["related"]}
    assert roles["asset"] == f"{store.root}/pools/n3-1" and roles.keys() >= {"flow-run", "task-run"}
    referenced, = sent_events(REFERENCED, store.root)
    assert referenced["resource"]["prefect.resource.id"] == f"{store.root}/pools/n3-1"


@pytest.mark.parametrize("folder", ["a space", "a?b", "a%b"])
def test_a_root_that_is_no_key_sends_nothing(monkeypatch, tmp_path, folder):
    sent = []
    monkeypatch.setattr(assets, "emit_event", lambda *_, **__: sent.append(True))
    (tmp_path / folder).mkdir()
    show_asset(Store(f"file://{tmp_path}/{folder}"), "pools/n3-1", "pool", images=1)
    assert not sent
    show_asset(Store(f"file://{tmp_path}/plain"), "pools/n3-1", "pool", images=1)
    assert sent
