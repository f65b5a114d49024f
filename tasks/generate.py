"""Draw the missing shards of pools."""

from collections.abc import Mapping

from prefect import task
from prefect.logging import get_run_logger

from hgdpo_core.comparison_run import ComparisonRun
from hgdpo_core.evaluate import plan_evaluation
from hgdpo_core.execution.jobs import offer_pool
from hgdpo_core.execution.runner import IN_PROCESS, Runner
from hgdpo_core.models import Model
from hgdpo_core.run import Run
from hgdpo_core.stages.pool import PoolPlan, plan_pool
from tasks.options import STAGE
from tasks.ui import stage_progress


@task(name="pool", **STAGE)
def draw_pool(run: Run, model: Model, runner: Runner = IN_PROCESS) -> PoolPlan:
    """N candidates for every training prompt."""
    plan = plan_pool(run.store, model, run.config.sampler.plain, run.config.pool, run.prompts.prompts)
    _draw({"pool": plan}, runner)
    return plan


@task(name="evaluation images", **STAGE)
def draw_evaluation(run: Run | ComparisonRun, models: Mapping[str, Model],
                    runner: Runner = IN_PROCESS) -> dict[str, PoolPlan]:
    """The held-out prompts by each model, under its name, with the seeds every model gets."""
    config, prompts = run.config, run.evaluation_prompts.prompts
    plans = {who: plan_evaluation(run.store, model, config.sampler, config.pool, config.evaluation, prompts)
             for who, model in models.items()}
    _draw(plans, runner)
    return plans


def _draw(plans: Mapping[str, PoolPlan], runner: Runner) -> None:
    runner.make([offer_pool(plan, title=who, share=runner.share) for who, plan in plans.items()], stage_progress)
    for who, plan in plans.items():
        get_run_logger().info("%s: %d images in %d shards; %d shards found, %d images drawn now (%s)", who, plan.images,
                              len(plan.shards), len(plan.shards) - len(plan.missing), plan.missing_images,
                              plan.folder.key)
