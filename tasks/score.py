"""Score the missing shards of pools."""

from collections.abc import Mapping

from prefect import task
from prefect.logging import get_run_logger

from hgdpo_core.comparison_run import ComparisonRun
from hgdpo_core.config import ScorerConfig
from hgdpo_core.execution.jobs import Work, offer_scores
from hgdpo_core.execution.runner import IN_PROCESS, Runner
from hgdpo_core.run import Run
from hgdpo_core.stages.pool import PoolPlan
from hgdpo_core.stages.scores import score_folder
from hgdpo_core.storage.shards import ShardFolder
from tasks.options import STAGE
from tasks.ui import stage_progress


@task(name="score", task_run_name="score {pool.pool_id} by {scorer.name}", **STAGE)
def score(run: Run, pool: PoolPlan, scorer: ScorerConfig, runner: Runner = IN_PROCESS) -> ShardFolder:
    """The folder with the scorer's scores for all of the pool's planned shards."""
    work = offer_scores(pool, score_folder(run.store, pool.pool_id, scorer), scorer, share=runner.share)
    _score([work], runner)
    return work.folder


@task(name="evaluation scores", **STAGE)
def score_evaluation(run: Run | ComparisonRun, images: Mapping[str, PoolPlan],
                     runner: Runner = IN_PROCESS) -> dict[str, dict[str, ShardFolder]]:
    """Each model's images by each judge of the evaluation: name of the model -> name of the scorer -> scores."""
    works = {(who, scorer.name): offer_scores(pool, score_folder(run.store, pool.pool_id, scorer), scorer,
                                              title=f"{scorer.name}, {who}", share=runner.share)
             for scorer in run.config.evaluation.scorers for who, pool in images.items()}
    _score(list(works.values()), runner)
    return {who: {scorer.name: works[who, scorer.name].folder for scorer in run.config.evaluation.scorers}
            for who in images}


def _score(works: list[Work], runner: Runner) -> None:
    runner.make(works, stage_progress)
    for work in works:
        get_run_logger().info("%s: %d shards scored now, %d in %s", work.title, len(work.missing), len(work.wanted),
                              work.folder.key)
