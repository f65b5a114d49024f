"""One range of shards as a flow run of its own: its Retry button makes only what is missing in the range."""

from typing import Any

from prefect import flow
from prefect.states import State

from flows.lifecycle import run_watched
from hgdpo_core.execution.jobs import ShardRequest
from tasks.shards import make_shards
from tasks.ui import explain_own_errors


@flow(name="hgdpo-shard")
def hgdpo_shard(request: ShardRequest) -> list[dict[str, Any]] | State[Any]:
    """Load the model once, make the range's missing shards, commit each as it finishes; returns a row per shard."""
    explain_own_errors()
    return run_watched(lambda watch: make_shards(request, watch))
