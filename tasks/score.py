"""Score a pool's missing shards."""

from prefect import task
from prefect.logging import get_run_logger

from hgdpo_core.comparison_run import ComparisonRun
from hgdpo_core.config import ScorerConfig
from hgdpo_core.generate import PoolPlan
from hgdpo_core.run import Run
from hgdpo_core.score import score_folder, score_pool
from hgdpo_core.shards import ShardFolder
from tasks.options import STAGE
from tasks.ui import stage_progress


@task(name="score", task_run_name="score {pool.pool_id} by {scorer.name}", **STAGE)
def score(run: Run | ComparisonRun, pool: PoolPlan, scorer: ScorerConfig) -> ShardFolder:
    """The folder with the scorer's scores for all of the pool's planned shards."""
    scores = score_folder(run.store, pool.pool_id, scorer)
    with stage_progress(f"{scorer.name}") as progress:
        made = score_pool(run.store, pool.folder, scores, scorer, pool.indices, progress=progress)
    get_run_logger().info("%s: %d images scored now, %d shards in %s", scorer.name, made, len(pool.shards), scores.key)
    return scores
