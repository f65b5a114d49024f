"""How a flow of this project runs, is stopped and is cancelled."""

from collections.abc import Callable
from typing import Any, TypeVar

from prefect.client.schemas.objects import FlowRun
from prefect.states import State

from flows.children import cancel_children
from flows.runner import ShardRunnerName, choose_runner
from flows.watch import answer_stop, watch_this_run
from hgdpo_core.config import WorkersConfig
from hgdpo_core.errors import StoppedError
from hgdpo_core.execution.runner import Runner
from hgdpo_core.progress import ShouldStop
from hgdpo_core.storage import Store

T = TypeVar("T")


def cancel_shard_runs(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """Hook: without it the shard runs of a cancelled run would go on, and those that wait would still start."""
    cancel_children(flow_run.id)


def run_watched(work: Callable[[ShouldStop], T]) -> T | State[Any]:
    """The result of `work` under a watch of this flow run; where the run is stopped, the state that it ends with."""
    with watch_this_run() as watch:
        try:
            if watch():
                raise StoppedError("stopped before it began")
            return work(watch)
        except StoppedError as error:
            return answer_stop(watch, error)


def run_with(name: ShardRunnerName, workers: WorkersConfig, store: Store,
             work: Callable[[Runner], T]) -> T | State[Any]:
    """`run_watched` for a flow that may start others: `work` gets the runner of this name."""
    return run_watched(lambda watch: work(choose_runner(name, workers, store, watch)))
