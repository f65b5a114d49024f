"""Scoring again, by hand or every night: what is missing or by a scorer that changed, and a report of the drift."""

from typing import Any

from prefect import flow
from prefect.states import Completed, State

from flows import parameters as p
from flows.full import cancel_shard_runs
from flows.nightly import reason_to_skip
from flows.runner import ShardRunnerName, choose_runner
from flows.watch import answer_stop, watch_this_run
from hgdpo_core.errors import StoppedError
from hgdpo_core.execution.runner import Runner
from hgdpo_core.rescore.night import Night
from hgdpo_core.rescore.plan import RescorePlan, Skipped
from hgdpo_core.rescore.wanted import wanted_workers
from hgdpo_core.run import default_root
from hgdpo_core.storage import Store
from tasks.rescore import begin, find_work, rank, report_drift, score_again
from tasks.ui import explain_own_errors

Overrides = dict[str, Any]


@flow(name="hgdpo-rescore", flow_run_name="rescore", validate_parameters=True, on_cancellation=[cancel_shard_runs])
def hgdpo_rescore(
    root: str | None = p.ROOT.field(),
    scorers: list[str] = p.SCORERS.field(),
    preset: str | None = p.SCORERS_PRESET.field(),
    overrides: Overrides = p.SCORERS_OVERRIDES.field(),
    verify: bool = p.VERIFY.field(),
    plan_only: bool = p.PLAN_ONLY.field(),
    shard_runner: ShardRunnerName = p.SHARD_RUNNER.field(),
) -> Any:
    """Score pools whose scores are missing or by a scorer that changed, rank them again, report the drift.

    Returns the night's summary. Never writes a pool and never trains. Where there is nothing to do, or a scheduled run
    had better not start, it ends Completed and its message says so.
    """
    explain_own_errors()
    if (reason := reason_to_skip()) is not None:
        return _completed("Skipped", f"skipped: {reason}")
    store = Store(default_root() if root is None else root)
    plan = find_work(store, scorers, preset, overrides, verify)
    if plan_only:
        return {"plan": plan.rows(), "skipped": [item.model_dump() for item in plan.skipped]}
    night = begin(store, plan)
    if night is None:
        return _completed("NothingToDo", plan.describe())
    with watch_this_run() as watch:
        try:
            workers = wanted_workers(store, preset, overrides)
            return _do(store, plan, night, choose_runner(shard_runner, workers, store, watch))
        except StoppedError as error:
            return answer_stop(watch, error)


def _do(store: Store, plan: RescorePlan, night: Night, runner: Runner) -> dict[str, Any]:
    given_up: list[Skipped] = []
    for version, jobs in plan.by_version():
        given_up += score_again(store, version, jobs, runner)
    rankings = [rank(store, job) for job in night.rankings]
    made = [ranking for ranking in rankings if not isinstance(ranking, Skipped)]
    left = [ranking for ranking in rankings if isinstance(ranking, Skipped)]
    return report_drift(store, night, made, [*plan.skipped, *given_up, *left])


def _completed(name: str, message: str) -> State[dict[str, Any]]:
    return Completed(name=name, message=message, data={"status": message})
