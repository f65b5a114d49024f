"""What a run makes as Prefect assets, so that the UI of a server that has them shows where a model comes from.

An asset's key is its URL in the store. Each run sends the event for what it completes, also where it found all of it
made: the latest materialisation then names the latest run that used it. Prefect's `@materialize` needs the key before
the task runs, and an id is known only inside; so the events that it sends are sent here. A server without assets keeps
them as events of the task's run.
"""

from collections.abc import Sequence

from prefect.assets import Asset
from prefect.events import emit_event
from prefect.logging import get_logger
from pydantic import ValidationError

from hgdpo_core.storage import Store

MATERIALIZED = "prefect.asset.materialization.succeeded"
REFERENCED = "prefect.asset.referenced"


def show_asset(store: Store, key: str, name: str, made_from: Sequence[str] = (), **counts: str | int | float) -> None:
    """Send that the folder `key` of the store is complete, what it was made from, and its counts.

    Nothing is sent where the root's URL is no key that Prefect takes, such as one with a space.
    """
    try:
        asset = Asset(key=store.url(key))
        sources = [Asset(key=store.url(source)) for source in made_from]
    except ValidationError as error:
        get_logger("hgdpo").debug("%s is no asset: %s", key, error)
        return
    for source in sources:
        emit_event(REFERENCED, resource={"prefect.resource.id": source.key})
    emit_event(MATERIALIZED, payload=counts, related=[
        {"prefect.resource.id": source.key, "prefect.resource.role": "asset"} for source in sources], resource={
        "prefect.resource.id": asset.key, "prefect.resource.name": f"{name} {key.rpartition('/')[2]}"})
