"""Score the missing shards of pools."""

from collections.abc import Mapping

from prefect import task
from prefect.logging import get_run_logger

from hgdpo_core import pipeline
from hgdpo_core.comparison_run import ComparisonRun
from hgdpo_core.execution.runner import IN_PROCESS, Runner
from hgdpo_core.run import Run
from hgdpo_core.stages.pool import PoolPlan
from hgdpo_core.storage.shards import ShardFolder
from tasks.options import STAGE
from tasks.ui import stage_progress


@task(name="score", task_run_name="score {pool.pool_id}", **STAGE)
def score_pool(run: Run, pool: PoolPlan, runner: Runner = IN_PROCESS) -> ShardFolder:
    """The folder with the ranking scorer's scores for all of the pool's planned shards."""
    folder = pipeline.score_pool(run, pool, runner, stage_progress)
    get_run_logger().info("Scores of %s by %s: %s", pool.pool_id, run.config.scorer.name, folder.key)
    return folder


@task(name="evaluation scores", **STAGE)
def score_evaluation(run: Run | ComparisonRun, images: Mapping[str, PoolPlan],
                     runner: Runner = IN_PROCESS) -> dict[str, dict[str, ShardFolder]]:
    """Each model's images by each scorer of the evaluation: name of the model -> name of the scorer -> scores."""
    scores = pipeline.score_evaluation(run, images, runner, stage_progress)
    for who, folders in scores.items():
        get_run_logger().info("Scores of the %s's images: %s", who, ", ".join(f.key for f in folders.values()))
    return scores
