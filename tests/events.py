"""Events that the server of a test got."""

import time

from prefect.client.orchestration import get_client

from flows.prefect_internals import send_all


def sent_events(name, prefix, at_least=1):
    """Events of this name about resources of this prefix, as soon as the server has so many."""
    send_all()
    query = {"filter": {"event": {"name": [name]}, "resource": {"id_prefix": [prefix]}}, "limit": 50}
    for _ in range(60):
        with get_client(sync_client=True) as client:
            found = client.request("POST", "/events/filter", json=query).json()["events"]
        if len(found) >= at_least:
            return found
        time.sleep(0.5)
    raise AssertionError(f"{len(found)} events {name} came, not {at_least}")
