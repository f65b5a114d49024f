"""Draw the missing shards of a pool."""

from prefect import task
from prefect.logging import get_run_logger

from hgdpo_core.comparison_run import ComparisonRun
from hgdpo_core.evaluate import plan_evaluation
from hgdpo_core.generate import PoolPlan, plan_pool
from hgdpo_core.models import Model
from hgdpo_core.run import Run
from hgdpo_core.runner import IN_PROCESS, Runner
from hgdpo_core.work import offer_pool
from tasks.options import STAGE
from tasks.ui import stage_progress


@task(name="pool", **STAGE)
def draw_pool(run: Run, model: Model, runner: Runner = IN_PROCESS) -> PoolPlan:
    """N candidates for every training prompt."""
    plan = plan_pool(run.store, model, run.config.sampler.plain, run.config.pool, run.prompts.prompts)
    return _draw(plan, "pool", runner)


@task(name="evaluation images", task_run_name="evaluation images: {who}", **STAGE)
def draw_evaluation(run: Run | ComparisonRun, model: Model, who: str, runner: Runner = IN_PROCESS) -> PoolPlan:
    """The held-out prompts by one model, with the seeds every model gets."""
    plan = plan_evaluation(run.store, model, run.config.sampler, run.config.pool, run.config.evaluation,
                           run.evaluation_prompts.prompts)
    return _draw(plan, who, runner)


def _draw(plan: PoolPlan, stage: str, runner: Runner) -> PoolPlan:
    with stage_progress(stage) as progress:
        runner.make(offer_pool(plan, share=runner.share), progress)
    get_run_logger().info("%s: %d images in %d shards; %d shards found, %d images drawn now (%s)", stage,
                          plan.images, len(plan.shards), len(plan.shards) - len(plan.missing), plan.missing_images,
                          plan.folder.key)
    return plan
