"""Score pools again: find what is missing, score it, rank it, report what changed."""

from collections.abc import Sequence
from typing import Any

from prefect.logging import get_run_logger

from hgdpo_core.errors import ConfigError, HGDPOError, StoppedError, StorageError
from hgdpo_core.execution.runner import InProcess, Runner
from hgdpo_core.progress import count_of
from hgdpo_core.rescore import Ranking, rank_again, score_missing, score_stage
from hgdpo_core.rescore.drift_report import drift_rows, headline, render_markdown
from hgdpo_core.rescore.plan import RankJob, RescorePlan, ScoreJob, ScorerVersion, Skipped, plan_root
from hgdpo_core.rescore.rescore_run import RescoreRun, close_rescore_run, open_rescore_run
from hgdpo_core.stages import Stage
from hgdpo_core.storage import Store
from tasks.handover import take_opened
from tasks.options import stage_task
from tasks.ui import show_table, show_text, stage_progress


@stage_task("find work")
def find_work(store: Store, scorers: Sequence[str], preset: str | None, overrides: dict[str, Any],
              verify: bool) -> RescorePlan:
    """What is missing under the root; loads no model."""
    logger = get_run_logger()
    plan = take_opened(plan_root, root=store.root, names=list(scorers), preset=preset, overrides=overrides,
                       verify=verify)
    logger.info("%s: %s", store.root, plan.describe())
    for item in plan.skipped:
        logger.warning("Skipped: %s: %s", item.what, item.reason)
    if not plan.nothing_to_do:
        show_table("rescore-plan", plan.rows(), "What is scored and ranked again")
    return plan


@stage_task("begin re-scoring")
def begin(store: Store, plan: RescorePlan) -> RescoreRun | None:
    """The record of the re-scoring, written before its work; None when there is nothing to do."""
    run = open_rescore_run(store, plan)
    if run is not None:
        get_run_logger().info("Rescore run %s, in %s", run.name, store.url(run.key("config.json")))
    return run


@stage_task("score again", "score again by {version.scorer.name}")
def score_again(store: Store, version: ScorerVersion, jobs: Sequence[ScoreJob],
                runner: Runner) -> list[Skipped]:
    """The missing scores of all pools by one scorer; returns the pools skipped."""
    logger = get_run_logger()
    if isinstance(runner, InProcess):  # one load serves all pools; a shard run is of one pool and loads its own
        with stage_progress(version.scorer.name) as progress:
            skipped = score_missing(store, jobs, progress=progress, should_stop=runner.should_stop)
    else:
        skipped = _score_on_workers(store, jobs, runner)
    for job in jobs:
        logger.info("%s %s: pool %s, %s in %s, in %s", version.scorer.name, version.fingerprint[:12], job.pool_id,
                    count_of(job.images, "image"), count_of(len(job.missing), "shard"), job.scores)
    for item in skipped:
        logger.warning("Skipped: %s: %s", item.what, item.reason)
    return skipped


def _score_on_workers(store: Store, jobs: Sequence[ScoreJob], runner: Runner) -> list[Skipped]:
    """The pools' shards by workers; returns the pools with failed shards, for the others continue."""
    stages = [score_stage(store, job) for job in jobs]
    try:
        runner.make(stages, stage_progress)
    except (StoppedError, ConfigError):
        raise
    except HGDPOError as error:
        return [Skipped(what=f"pool {job.pool_id} by {job.version.scorer.name}", reason=str(error))
                for job, stage in zip(jobs, stages, strict=True) if not _is_done(stage)]
    return []


def _is_done(stage: Stage) -> bool:
    try:
        return not stage.find_missing()
    except StorageError:  # a shard of images that is gone, or was broken and moved to quarantine
        return False


@stage_task("rank again")
def rank(store: Store, job: RankJob) -> Ranking | Skipped:
    """A data set of triplets by the new scores."""
    with stage_progress("triplets") as progress:
        ranking = rank_again(store, job, progress=progress)
    if isinstance(ranking, Skipped):
        get_run_logger().warning("Not ranked: %s: %s", ranking.what, ranking.reason)
    else:
        get_run_logger().info("Triplets: %d; pools without a pair: %d; in %s (before: %s)", ranking.counts.triplets,
                              ranking.counts.rejected, ranking.key, job.replaces)
    return ranking


@stage_task("drift")
def report_drift(store: Store, run: RescoreRun, rankings: Sequence[Ranking],
                 skipped: Sequence[Skipped]) -> dict[str, Any]:
    """The drift report, in `rescores/<name>/` and in the UI; returns the summary."""
    report = close_rescore_run(store, run, rankings, skipped)
    show_table("drift", drift_rows(report), "Rankings and scores, before and now")
    show_text("drift-report", render_markdown(report), "What changed from the last scores of each pool")
    if report["skipped"]:
        show_table("rescore-skipped", report["skipped"], "Skipped, with reasons")
    get_run_logger().info("%s Report: %s", headline(report), store.url(run.key("report.html")))
    return {"night": run.name, "root": store.root, "headline": headline(report), "drift": drift_rows(report),
            "triplets": report["triplets"], "skipped": report["skipped"],
            "artifacts": {"report": store.url(run.key("report.html")),
                          "triplets": [store.url(ranking.key) for ranking in rankings]}}
