"""Score a pool's missing shards."""

from prefect import task
from prefect.logging import get_run_logger

from hgdpo_core.comparison_run import ComparisonRun
from hgdpo_core.config import ScorerConfig
from hgdpo_core.generate import PoolPlan
from hgdpo_core.run import Run
from hgdpo_core.runner import IN_PROCESS, Runner
from hgdpo_core.score import score_folder
from hgdpo_core.shards import ShardFolder
from hgdpo_core.work import offer_scores
from tasks.options import STAGE
from tasks.ui import stage_progress


@task(name="score", task_run_name="score {pool.pool_id} by {scorer.name}", **STAGE)
def score(run: Run | ComparisonRun, pool: PoolPlan, scorer: ScorerConfig,
          runner: Runner = IN_PROCESS) -> ShardFolder:
    """The folder with the scorer's scores for all of the pool's planned shards."""
    scores = score_folder(run.store, pool.pool_id, scorer)
    work = offer_scores(pool, scores, scorer, share=runner.share)
    with stage_progress(f"{scorer.name}") as progress:
        runner.make(work, progress)
    get_run_logger().info("%s: %d shards scored now, %d in %s", scorer.name, len(work.missing), len(pool.shards),
                          scores.key)
    return scores
