"""Score the missing shards of pools."""

from collections.abc import Mapping

from prefect.logging import get_run_logger

from hgdpo_core import pipeline
from hgdpo_core.execution.runner import Runner
from hgdpo_core.progress import StageProgress
from hgdpo_core.run import Run
from hgdpo_core.run.comparison import ComparisonRun
from hgdpo_core.stages.pool import PoolPlan
from hgdpo_core.storage.shards import ShardFolder
from tasks.assets import show_asset
from tasks.options import stage_task


@stage_task("score")
def score_pool(run: Run, pool: PoolPlan, runner: Runner, on: StageProgress) -> ShardFolder:
    """The folder with the ranking scorer's scores for all of the pool's planned shards."""
    folder = pipeline.score_pool(run, pool, runner, on)
    get_run_logger().info("Scores of %s by %s: %s", pool.pool_id, run.config.scorer.name, folder.key)
    show_asset(run.store, folder.key, "scores", [pool.folder.key], images=pool.images, scorer=run.config.scorer.name)
    return folder


@stage_task("evaluation scores")
def score_evaluation(run: Run | ComparisonRun, images: Mapping[str, PoolPlan], runner: Runner,
                     on: StageProgress) -> dict[str, dict[str, ShardFolder]]:
    """Each model's images by each scorer of the evaluation: name of the model -> name of the scorer -> scores."""
    scores = pipeline.score_evaluation(run, images, runner, on)
    for who, folders in scores.items():
        get_run_logger().info("Scores of the %s's images: %s", who, ", ".join(f.key for f in folders.values()))
        for scorer, folder in folders.items():
            show_asset(run.store, folder.key, "scores", [images[who].folder.key], images=images[who].images,
                       scorer=scorer)
    return scores
