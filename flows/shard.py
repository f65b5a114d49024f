"""One range of shards as a flow run of its own: its Retry button makes only what is missing in the range."""

from typing import Any

from prefect import flow
from prefect.states import State

from flows.watch import answer_stop, watch_this_run
from hgdpo_core.errors import StoppedError
from hgdpo_core.execution.jobs import ShardRequest
from tasks.shards import make_shards
from tasks.ui import explain_own_errors


@flow(name="hgdpo-shard", validate_parameters=True)
def hgdpo_shard(request: ShardRequest) -> list[dict[str, Any]] | State[Any]:
    """Load the model once, make the range's missing shards, commit each as it finishes; returns a row a shard."""
    explain_own_errors()
    with watch_this_run() as watch:
        try:
            if watch():
                raise StoppedError("stopped before it began")
            return make_shards(request, watch)
        except StoppedError as error:
            return answer_stop(watch, error)
