"""How a flow of this project runs, is stopped and is cancelled."""

import re
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any, TypeVar
from uuid import UUID

from coolname.data import config as coolname_words
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.runtime import deployment, flow_run
from prefect.states import State

from flows.children import cancel_children
from flows.runner import ShardRunnerName, choose_runner
from flows.watch import answer_stop, watch_this_run
from hgdpo_core.built_in import is_any_built_in
from hgdpo_core.config import WorkersConfig
from hgdpo_core.errors import ConfigError, StoppedError
from hgdpo_core.execution.runner import Runner
from hgdpo_core.progress import ShouldStop
from hgdpo_core.storage import Store

T = TypeVar("T")
FORM_NAME = re.compile(r"(alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|omicron|pi|rho|sigma"
                       r"|tau|upsilon|phi|chi|psi|omega)\d+-[a-z]+(-[a-z]+)*")
"""Eight of nine names that the form of Prefect 3.8's UI suggests; the ninth, without a number, could be typed."""


def name_this_run(*parts: str) -> None:
    """Name this flow run by what tells it from others, a path by its last part, unless a name was typed."""
    if flow_run.name is None or not _is_random(flow_run.name):
        return
    name = " ".join(dict.fromkeys(part.rstrip("/").rpartition("/")[2] or part for part in parts))
    with get_client(sync_client=True) as client:
        client.set_flow_run_name(UUID(flow_run.id), name)


def _is_random(name: str) -> bool:
    """Whether Prefect made the name up: its server of two of its words, the form of its UI as `rho2-napinne`."""
    if FORM_NAME.fullmatch(name):
        return True
    lists = (part.get("words", ()) for part in coolname_words.values())
    known = {word for words in lists for word in words}
    return len(words := name.split("-")) == 2 and known.issuperset(words)


def refuse_relative_paths(**given: str | None) -> None:
    """ConfigError for a relative path in a run of a deployment: a worker would look it up in a folder of its own."""
    if deployment.id is None:
        return
    for name, value in given.items():
        if value and not is_any_built_in(value) and _is_relative(value, is_root=name == "root"):
            raise ConfigError(f"{name} is the relative path {value!r}, which a worker would look up in its own folder "
                              f"({Path.cwd()}): give the absolute path, or a URL that all workers reach")


def _is_relative(value: str, *, is_root: bool) -> bool:
    if "://" in value or PurePath(value).is_absolute() or value.startswith("~"):
        return False
    return is_root or value.startswith(".") or bool(PurePath(value).suffix) or Path(value).exists()  # else a hub id


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
