"""Open the run: check all inputs, log what they are."""

from typing import Any

from prefect.logging import get_run_logger

from hgdpo_core.config import UNKNOWN_LICENCE
from hgdpo_core.config.base import StageConfig
from hgdpo_core.plan import plan_run
from hgdpo_core.plan.table import readable_bytes, readable_hours, readable_time
from hgdpo_core.prompts.syntax import describe_unread
from hgdpo_core.rendering.settings import settings_table
from hgdpo_core.run import Run, open_run
from hgdpo_core.run.comparison import ComparisonRun, open_comparison, plan_comparison
from tasks.handover import take_opened
from tasks.options import stage_task
from tasks.ui import show_table, show_text


def show_settings(config: StageConfig) -> None:
    """Every setting as an artifact of the flow run, from its start: a run that fails has them too."""
    show_text("settings", settings_table(value=config).markdown(), "Every setting of this run")


@stage_task("prepare")
def prepare(**parameters: Any) -> Run:
    """The checked run; takes the parameters of `open_run`. Mistakes fail here, before a model loads."""
    logger = get_run_logger()
    run = take_opened(open_run, **parameters)
    logger.info("Run %s in %s", run.run_id, run.store.root)
    logger.info("Prompts: %s; evaluation: %s", run.prompts.describe(), run.evaluation_prompts.describe())
    unread = describe_unread(run.prompts.prompts, run.config.target.prompt_syntax)
    if unread:
        logger.warning("Prompts: %s", unread)
    logger.info("Target: %s (%s, %s)", run.target.path.name, run.target.fingerprint[:12], run.target.dtype)
    if run.images is not None:
        logger.info("Images for SFT: %s", run.images.describe())
    if run.pairs is not None:
        logger.info("Trained on foreign pairs, not on a pool: %s", run.pairs.describe())
        if run.pairs.licence == UNKNOWN_LICENCE:
            logger.warning("No licence of %s is known: without one, what is made of its images may not be passed on",
                           run.pairs.name)
    return run


@stage_task("prepare comparison")
def prepare_comparison(**parameters: Any) -> ComparisonRun:
    """The checked comparison; takes the parameters of `open_comparison`. Mistakes fail here, before a model loads."""
    logger = get_run_logger()
    run = take_opened(open_comparison, **parameters)
    logger.info("Comparison %s in %s", run.run_id, run.store.root)
    logger.info("Prompts: %s", run.evaluation_prompts.describe())
    if run.people is not None:
        logger.info("Concepts: %s; %d samples. Only faces of people who agreed", run.people.describe(),
                    len(run.samples))
    for who, model in (("Target", run.target), ("Tuned", run.tuned)):
        lora = f" with {model.lora.path.name} at weight {model.lora.weight}" if model.lora else ""
        logger.info("%s: %s%s (%s, %s)", who, model.path.name, lora, model.fingerprint[:12], model.dtype)
    return run


@stage_task("plan")
def show_plan(run: Run, with_probe: bool = False) -> dict[str, Any]:
    """What the run would make and what exists, as in `RunPlan`; makes nothing."""
    if with_probe:
        get_run_logger().info("Timing a batch of each stage that has work to do: this loads the models")
    plan = plan_run(run, with_probe=with_probe)
    rows = [{"stage": stage.stage, "unit": stage.unit, "to make": stage.missing, "of": stage.total,
             "shards to make": stage.missing_shards, "to store": readable_bytes(stage.bytes_missing),
             "time": readable_time(stage.seconds), "estimated from": stage.basis, "folder": stage.folder,
             "note": stage.note} for stage in plan.stages]
    whole = f"{readable_hours(plan)} on {plan.device}, {readable_bytes(plan.bytes_missing)} to store"
    show_table("plan", rows, f"What {run.run_id} would do: {whole}. {'; '.join(plan.notes)}")
    get_run_logger().info("Plan of %s: %s; nothing was made", run.run_id, whole)
    return plan.model_dump(mode="json")


@stage_task("plan comparison")
def show_comparison_plan(run: ComparisonRun) -> list[dict[str, Any]]:
    """What the comparison would generate and what exists; generates nothing."""
    rows = plan_comparison(run)
    show_table("plan", rows, f"What {run.run_id} would do")
    return rows
