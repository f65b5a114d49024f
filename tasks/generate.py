"""Generate the missing shards of pools."""

from collections.abc import Mapping

from prefect.logging import get_run_logger

from hgdpo_core import pipeline
from hgdpo_core.comparison_run import ComparisonRun
from hgdpo_core.execution.runner import Runner
from hgdpo_core.models import Model
from hgdpo_core.progress import StageProgress
from hgdpo_core.run import Run
from hgdpo_core.stages.pool import PoolPlan
from tasks.options import stage_task


@stage_task("pool")
def make_pool(run: Run, model: Model, runner: Runner, on: StageProgress) -> PoolPlan:
    """N candidates for every training prompt."""
    pool = pipeline.make_pool(run, model, runner, on)
    _log(pool)
    return pool


@stage_task("evaluation images")
def generate_evaluation(run: Run | ComparisonRun, models: Mapping[str, Model], runner: Runner,
                        on: StageProgress) -> dict[str, PoolPlan]:
    """Images for the held-out prompts by each model, under its name, with the same seeds for every model."""
    plans = pipeline.generate_evaluation(run, models, runner, on)
    for plan in plans.values():
        _log(plan)
    return plans


def _log(plan: PoolPlan) -> None:
    get_run_logger().info("%s: %d images in %d shards; %d shards existed, %d images generated now (%s)", plan.title,
                          plan.images, len(plan.shards), len(plan.shards) - len(plan.missing), plan.missing_images,
                          plan.folder.key)
