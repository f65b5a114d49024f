"""Whether a scheduled run should not start."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter
from prefect.client.schemas.objects import StateType
from prefect.runtime import deployment, flow_run

MAX_AGE = timedelta(hours=12)
FULL = "hgdpo"
ACTIVE = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


def reason_to_skip() -> str | None:
    """Why this flow run should end at once; None for one that should run, and for one started without a deployment.

    A run started by the command is never skipped; only scheduled ones give way.
    """
    if not deployment.id:
        return None
    return check_schedule(flow_run.scheduled_start_time, datetime.now(UTC), run_count=flow_run.run_count,
                          running=active_runs(FULL))


def check_schedule(scheduled: datetime, now: datetime, *, run_count: int, running: Sequence[str]) -> str | None:
    """A run over 12 h late gives way to the next night, any run to a live `hgdpo/full`: both need the GPU.

    A retry keeps the time it was first scheduled for, so its age does not count.
    """
    age = now - scheduled
    if run_count <= 1 and age > MAX_AGE:
        hours = age / timedelta(hours=1)
        return (f"scheduled for {scheduled:%Y-%m-%d %H:%M} UTC, {hours:.0f} hours ago (at most "
                f"{MAX_AGE / timedelta(hours=1):.0f}); the next night does its work")
    if running:
        return f"hgdpo/full is running ({', '.join(running)}); the next night does this run's work"
    return None


def active_runs(flow_name: str) -> list[str]:
    """Names of the flow's runs that are running or about to."""
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[flow_name])),
            flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": ACTIVE}}}))
    return [run.name for run in runs]
