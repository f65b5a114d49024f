"""Generate the missing shards of pools."""

from collections.abc import Mapping, Sequence

from prefect.logging import get_run_logger

from hgdpo_core import pipeline
from hgdpo_core.execution.runner import Runner
from hgdpo_core.models import Model
from hgdpo_core.progress import StageProgress, count_of
from hgdpo_core.run import Run
from hgdpo_core.run.comparison import ComparisonRun
from hgdpo_core.stages.pool import PoolPlan
from tasks.assets import show_asset
from tasks.options import stage_task


@stage_task("pool")
def make_pool(run: Run, model: Model, runner: Runner, on: StageProgress) -> PoolPlan:
    """N candidates for every training prompt."""
    pool = pipeline.make_pool(run, model, runner, on)
    _report(pool)
    return pool


@stage_task("evaluation images")
def generate_evaluation(run: Run | ComparisonRun, models: Mapping[str, Model], runner: Runner,
                        on: StageProgress) -> dict[str, PoolPlan]:
    """Images for the held-out prompts by each model, under its name, with the same seeds for every model."""
    plans = pipeline.generate_evaluation(run, models, runner, on)
    for who, plan in plans.items():
        lora = models[who].lora
        _report(plan, [f"models/{lora.path.name}"] if lora and isinstance(run, Run) else [])
    return plans


def _report(plan: PoolPlan, made_from: Sequence[str] = ()) -> None:
    existing = len(plan.shards) - len(plan.missing)
    get_run_logger().info("%s: %s in %s, of which %d existed; %s generated now (%s)", plan.title,
                          count_of(plan.images, "image"), count_of(len(plan.shards), "shard"), existing,
                          count_of(plan.missing_images, "image"), plan.folder.key)
    show_asset(plan.folder.store, plan.folder.key, "pool", made_from, images=plan.images, shards=len(plan.shards),
               generated=plan.missing_images)
