"""Jobs as flow runs: started one after another, awaited together, started again where work is missing."""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterIdempotencyKey,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_logger, get_run_logger
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Crashed
from prefect.utilities.urls import url_for

from hgdpo_core.config import WorkersConfig
from hgdpo_core.errors import ConfigError, HGDPOError, StoppedError, StorageError
from hgdpo_core.progress import ShouldStop

LIVE = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING]
PAGE = 100  # runs per request; the server's limit is 200
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 5.0
JOBS_A_PAUSE = 20  # so many open ones double the first pause
NAMED_FAILURES = 5
PATIENCE_SECONDS = 300.0
RESTART_SECONDS = 5.0
"""A worker dies when it is given a run again while it still has that run's last process (Prefect 3.8.8)."""

T = TypeVar("T")


class ShardRunsError(HGDPOError):
    """Some shard runs failed; the message names them and what to do. Finished shards are kept."""


@dataclass
class Job:
    """One job for a flow run of its own."""

    name: str
    deployment: str
    request: dict[str, Any]
    tags: list[str]
    tag: str
    """On every run of this job, no matter which parent started it."""
    key: str
    """The idempotency key: the same attempt of the same parent never starts it twice."""
    is_done: Callable[[], bool]
    run: FlowRun | None = None
    done: bool = False
    starts: int = field(default=0, repr=False)
    """How often this attempt of the parent started it."""
    judged: UUID | None = field(default=None, repr=False)
    """The final state that was already handled."""
    given_up: bool = field(default=False, repr=False)
    """It never got a run, since too many others had failed."""
    pending: tuple[UUID, float] | None = field(default=None, repr=False)
    """The state Pending that it is in, and when that was seen first, on this process's clock."""

    @property
    def waits(self) -> bool:
        """It has no run yet."""
        return self.run is None and not self.done and not self.given_up

    @property
    def live(self) -> bool:
        return self.waits or self.open

    @property
    def open(self) -> bool:
        """Its run waits for a worker or runs."""
        return not self.done and self.run is not None and (self.run.state is None or not self.run.state.is_final())

    @property
    def failed(self) -> bool:
        return not self.done and not self.live

    def row(self) -> dict[str, Any]:
        """The job as a table shows it."""
        run = self.run
        return {"run": f"[{self.name}]({_url(run)})" if run else self.name,
                "state": run.state.name if run and run.state else "not started",
                "work": "done" if self.done else "missing",
                "seconds": round(run.total_run_time.total_seconds(), 1) if run else 0.0,
                "attempts": run.run_count if run else 0}


OnChange = Callable[[Sequence[Job]], None]


def run_jobs(jobs: Sequence[Job], workers: WorkersConfig, *, should_stop: ShouldStop, on_change: OnChange) -> None:
    """Returns when the work of every job exists.

    At most `workers.open_runs` wait or run at once. A run's Completed is not trusted: its work is checked. All runs
    end before this fails with ShardRunsError; once more than `workers.max_failed_shards` have failed, no further one
    starts. A failed run that is retried meanwhile counts as live again, and one that stays Pending is marked Crashed.
    StoppedError after `should_stop`.
    """
    with get_client(sync_client=True) as client:
        _patiently(lambda: _require_deployments(client, jobs))
        _patiently(lambda: _attach(client, jobs))
        _await_all(client, jobs, workers, should_stop, on_change)
    failed = [job for job in jobs if job.failed]
    if failed:
        raise ShardRunsError(_explain(failed, len(jobs)))


def cancel_children(parent_id: UUID) -> int:
    """Cancel every live run that a run started; returns how many. Runs that wait never start."""
    with get_client(sync_client=True) as client:
        runs = _patiently(lambda: _read_all(client, FlowRunFilter(
            parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[parent_id]), state=_of_types(LIVE))))
        for run in runs:
            state = Cancelling(message="The run that started it was cancelled.")
            _patiently(functools.partial(client.set_flow_run_state, run.id, state))
    return len(runs)


def _patiently(ask: Callable[[], T]) -> T:
    """A busy SQLite answers 503 and a restarting server not at all: ask again for some minutes."""
    ends, pause = time.monotonic() + PATIENCE_SECONDS, 1.0
    while True:
        try:
            return ask()
        except httpx.HTTPError as error:
            refused = isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500
            if refused or time.monotonic() > ends:
                raise
            get_logger("hgdpo").warning("the Prefect server does not answer (%s): asking again", type(error).__name__)
        time.sleep(pause)
        pause = min(2 * pause, 15.0)


# -- starting


def _require_deployments(client: SyncPrefectClient, jobs: Sequence[Job]) -> None:
    for name in sorted({job.deployment for job in jobs}):
        try:
            client.read_deployment_by_name(name)
        except ObjectNotFound:
            raise ConfigError(f"the Prefect server {client.api_url} has no deployment {name}: run `make up` on this "
                              "machine, or `prefect deploy --all` for a server elsewhere (docs/OPERATIONS.md); or "
                              "choose shard_runner in_process") from None


def _attach(client: SyncPrefectClient, jobs: Sequence[Job]) -> None:
    """Find live runs of the same work, of any parent, then this parent's own from an earlier attempt."""
    waiting = [job for job in jobs if job.run is None]
    by_tag = _read_by(client, waiting, lambda part: FlowRunFilter(
        tags=FlowRunFilterTags(any_=[job.tag for job in part]), state=_of_types(LIVE)))
    by_key = _read_by(client, waiting, lambda part: FlowRunFilter(
        idempotency_key=FlowRunFilterIdempotencyKey(any_=[job.key for job in part])))
    own = {run.idempotency_key: run for run in by_key}
    for job in waiting:
        # The tag names the range, the request all of it: another parent may cut its ranges differently.
        same = [run for run in by_tag if job.tag in run.tags and run.parameters.get("request") == job.request]
        job.run = same[0] if same else own.get(job.key)
        if job.run is not None:
            get_run_logger().info("%s: found run %s, %s", job.name, job.run.name,
                                  job.run.state.name if job.run.state else "new")
        if job.run is not None and job.run.state is not None and job.run.state.is_final():
            _start(client, job)


def _start(client: SyncPrefectClient, job: Job) -> None:
    """A new run, or the earlier one of the same key again: Prefect would return that one as it ended."""
    if job.run is not None:
        state = AwaitingRetry(scheduled_time=datetime.now(UTC) + timedelta(seconds=RESTART_SECONDS),
                              message="Started again by its parent: work is missing.")
        client.set_flow_run_state(job.run.id, state)
        job.starts += 1
        job.run = client.read_flow_run(job.run.id)
        return
    job.run = run_deployment(  # pyright: ignore[reportAttributeAccessIssue]: no coroutine outside an event loop
        job.deployment, parameters={"request": job.request}, flow_run_name=job.name, tags=[*job.tags, job.tag],
        idempotency_key=job.key, timeout=0)
    job.starts += 1


def _start_more(client: SyncPrefectClient, jobs: Sequence[Job], open_runs: int, should_stop: ShouldStop) -> None:
    """Every waiting run costs the server something at each poll of a worker and of its own services."""
    free = max(open_runs - sum(job.open for job in jobs), 0)
    for job in [job for job in jobs if job.waits][:free]:
        if should_stop():
            return
        _start(client, job)


# -- waiting


def _await_all(client: SyncPrefectClient, jobs: Sequence[Job], workers: WorkersConfig, should_stop: ShouldStop,
               on_change: OnChange) -> None:
    pause, before = 0.0, None
    while any(job.live for job in jobs):
        if should_stop():
            raise StoppedError("stopped while waiting for shard runs")
        time.sleep(pause)
        try:
            _look(client, jobs)
            for job in jobs:
                _crash_if_stuck(client, job, workers.pending_seconds)
            if sum(job.failed for job in jobs) > workers.max_failed_shards:
                _start_no_more(client, jobs)
            _start_more(client, jobs, workers.open_runs, should_stop)
        except httpx.HTTPStatusError as error:
            if error.response.status_code < 500:
                raise
        except httpx.HTTPError:
            pass  # the runs do not need the server to continue, and it may be away for any time
        states = [(job.done, job.run.state.name if job.run and job.run.state else None) for job in jobs]
        # Where many are open, something changes all the time, and reading them all would be most of the server's work.
        first = FIRST_PAUSE_SECONDS * (1 + sum(job.open for job in jobs) / JOBS_A_PAUSE)
        pause = min(first if states != before else pause * 1.5, LONGEST_PAUSE_SECONDS)
        before = states
        on_change(jobs)


def _look(client: SyncPrefectClient, jobs: Sequence[Job]) -> None:
    open_jobs = [job for job in jobs if not job.done and job.run is not None]
    runs = {run.id: run for run in _read_by(client, open_jobs, lambda part: FlowRunFilter.model_validate(
        {"id": {"any_": [job.run.id for job in part if job.run]}}))}
    for job in open_jobs:
        assert job.run is not None
        job.run = runs.get(job.run.id, job.run)
        state = job.run.state
        if state is None or not state.is_final() or state.id == job.judged:
            continue
        job.done = _is_done(job)
        if not job.done:
            _go_on_without(client, job)
        job.judged = state.id


def _crash_if_stuck(client: SyncPrefectClient, job: Job, seconds: float) -> None:
    """A worker took the run and died. The automations see that too, unless a locked SQLite lost their count."""
    state = job.run.state if job.run and not job.done else None
    if state is None or not state.is_pending():
        return
    if job.pending is None or job.pending[0] != state.id:
        job.pending = state.id, time.monotonic()
    elif time.monotonic() - job.pending[1] > seconds:
        message = f"Pending for {seconds:.0f} s: its worker is gone. Retry starts it elsewhere."
        assert job.run is not None
        client.set_flow_run_state(job.run.id, Crashed(message=message))


def _is_done(job: Job) -> bool:
    try:
        return job.is_done()
    except StorageError as error:  # such as a broken input that a shard run moved to quarantine
        get_run_logger().warning("%s: %s", job.name, error)
        return False


def _go_on_without(client: SyncPrefectClient, job: Job) -> None:
    """A run ended and its work is missing. What this attempt started and what failed is left to the user."""
    assert job.run is not None and job.run.state is not None
    if job.starts == 0:  # another parent's, or left from an earlier attempt
        job.run = None
        _attach(client, [job])
        if job.run is None:
            _start(client, job)
    elif job.starts == 1 and job.run.state.is_completed():
        _start(client, job)
    else:
        state = job.run.state
        get_run_logger().warning("%s ended as %s without its work (%s). Retry on it makes what is missing: %s",
                                 job.name, state.name, (state.message or "no message").strip()[:200], _url(job.run))


def _start_no_more(client: SyncPrefectClient, jobs: Iterable[Job]) -> None:
    for job in jobs:
        job.given_up = job.given_up or job.waits
        if job.open and job.run is not None and job.run.state and job.run.state.type == StateType.SCHEDULED:
            client.set_flow_run_state(job.run.id, Cancelled(message="Not started: too many others failed."))


def _explain(failed: Sequence[Job], total: int) -> str:
    def one(job: Job) -> str:
        state = job.run.state if job.run else None
        says = f"{state.name}: {(state.message or '').strip()[:200]}" if state else "not started"
        return f"{job.name!r} {says}"

    failed = sorted(failed, key=lambda job: job.run is None)
    named = "; ".join(one(job) for job in failed[:NAMED_FAILURES])
    more = f"; and {len(failed) - NAMED_FAILURES} more" if len(failed) > NAMED_FAILURES else ""
    return (f"{len(failed)} of {total} shard runs failed ({named}{more}). Finished shards are kept: press Retry on "
            f"this run, which starts the failed ones again, or on one of them alone: {_url(failed[0].run)}")


# -- reading


def _read_by(client: SyncPrefectClient, jobs: Sequence[Job],
             make_filter: Callable[[Sequence[Job]], FlowRunFilter]) -> list[FlowRun]:
    return [run for start in range(0, len(jobs), PAGE)
            for run in _read_all(client, make_filter(jobs[start:start + PAGE]))]


def _read_all(client: SyncPrefectClient, flow_run_filter: FlowRunFilter) -> list[FlowRun]:
    found: list[FlowRun] = []
    while True:
        page = client.read_flow_runs(flow_run_filter=flow_run_filter, limit=PAGE, offset=len(found))
        found += page
        if len(page) < PAGE:
            return found


def _of_types(types: list[StateType]) -> FlowRunFilterState:
    return FlowRunFilterState(type=FlowRunFilterStateType(any_=types))


def _url(run: FlowRun | None) -> str:
    return url_for("flow-run", run.id) or "" if run else ""
