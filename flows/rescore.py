"""Re-scoring, by hand or every night: what is missing or by a scorer that changed, and a report of the drift."""

from typing import Any

from prefect import flow
from prefect.states import Completed, State

from flows import parameters as p
from flows.lifecycle import cancel_shard_runs, name_this_run, refuse_relative_paths, run_with
from flows.nightly import reason_to_skip
from flows.runner import ShardRunnerName
from flows.terminal import open_store
from hgdpo_core.execution.runner import Runner
from hgdpo_core.rescore.plan import RescorePlan, Skipped
from hgdpo_core.rescore.requested import requested_workers
from hgdpo_core.rescore.rescore_run import RescoreRun
from hgdpo_core.storage import Store
from tasks.rescore import begin, find_work, rank, report_drift, score_again
from tasks.ui import explain_own_errors


@flow(name="hgdpo-rescore", on_cancellation=[cancel_shard_runs])
def hgdpo_rescore(
    root: str | None = p.ROOT.field(),
    scorers: list[str] = p.SCORERS.field(),
    preset: str | None = p.SCORERS_PRESET.field(),
    overrides: dict[str, Any] = p.SCORERS_OVERRIDES.field(),
    verify: bool = p.VERIFY.field(),
    plan_only: bool = p.PLAN_ONLY.field(),
    shard_runner: ShardRunnerName = p.SHARD_RUNNER.field(),
) -> Any:
    """Score pools whose scores are missing or by a scorer that changed, rank them again, report the drift.

    Returns the summary. Never writes a pool and never trains. Where there is nothing to do, or a scheduled run
    should not start, it ends Completed with the reason as its message.
    """
    explain_own_errors()
    refuse_relative_paths(root=root)
    if (reason := reason_to_skip()) is not None:
        return _completed("Skipped", f"skipped: {reason}")
    store = open_store(root)
    name_this_run("re-scoring", store.root)
    plan = find_work(store, scorers, preset, overrides, verify)
    if plan_only:
        return {"plan": plan.rows(), "skipped": [item.model_dump() for item in plan.skipped]}
    run = begin(store, plan)
    if run is None:
        return _completed("NothingToDo", plan.describe())
    return run_with(shard_runner, requested_workers(store, preset, overrides), store,
                    lambda runner: _rescore(store, plan, run, runner))


def _rescore(store: Store, plan: RescorePlan, run: RescoreRun, runner: Runner) -> dict[str, Any]:
    skipped = list(plan.skipped)
    for version, jobs in plan.by_version():
        skipped += score_again(store, version, jobs, runner)
    rankings = [rank(store, job) for job in run.rankings]
    skipped += [ranking for ranking in rankings if isinstance(ranking, Skipped)]
    return report_drift(store, run, [ranking for ranking in rankings if not isinstance(ranking, Skipped)], skipped)


def _completed(name: str, message: str) -> State[dict[str, Any]]:
    return Completed(name=name, message=message, data={"status": message})
