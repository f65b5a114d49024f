"""Train an adapter on images of people: the steps of `hgdpo personalise`."""

from functools import partial
from typing import Any

from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed

from hgdpo_core import personalise
from hgdpo_core.execution.runner import Runner
from hgdpo_core.personalise import PersonaliseRun, open_personalise, plan_personalise
from hgdpo_core.progress import StageProgress, StageTimes, count_of
from hgdpo_core.stages.concept_latents import ConceptLatentStage
from hgdpo_core.stages.image_latents import find_skipped
from hgdpo_core.training.tune import Tuned
from tasks.assets import show_asset
from tasks.handover import take_opened
from tasks.options import stage_task
from tasks.ui import show_table, show_text
from tasks.validation import training_progress


@stage_task("prepare personalisation")
def prepare_personalise(**parameters: Any) -> PersonaliseRun:
    """The checked run; takes the parameters of `open_personalise`. Mistakes fail here, before a model loads."""
    logger = get_run_logger()
    run = take_opened(open_personalise, **parameters)
    logger.info("Adapter %s in %s", run.run_id, run.store.root)
    logger.info("Images of people: %s. Only people who agreed", run.images.describe())
    logger.info("Target: %s (%s, %s)", run.target.path.name, run.target.fingerprint[:12], run.target.dtype)
    return run


@stage_task("plan personalisation")
def show_personalise_plan(run: PersonaliseRun) -> list[dict[str, Any]]:
    """What the run would make and what exists; makes nothing."""
    rows = plan_personalise(run)
    show_table("plan", rows, f"What {run.run_id} would do")
    return rows


@stage_task("encode people")
def encode_people(run: PersonaliseRun, runner: Runner, on: StageProgress) -> ConceptLatentStage:
    """Latents and concepts of the images; those without exactly one face are counted by reason."""
    stage = personalise.encode_people(run, runner, on)
    counts, skipped = stage.counts(), find_skipped(stage.folder, len(run.images))
    get_run_logger().info("Images of people: %s used of %s", f"{counts.used:,}", f"{counts.images:,}")
    if skipped.describe():
        get_run_logger().warning("Images of people: %s; %s/rejected lists them", skipped.describe(),
                                 run.store.url(stage.folder.key))
        show_table("images-set-aside", skipped.reasons, skipped.describe())
    return stage


@stage_task("adapter")
def train_adapter(run: PersonaliseRun, runner: Runner, on: StageProgress) -> Tuned:
    """The adapter beside the frozen target."""
    adapter = personalise.train_adapter(run, runner, on, partial(training_progress, on=on))
    get_run_logger().info("Adapter: %s %s", "existing" if adapter.existing else "trained", adapter.path)
    show_table("adapter-log", adapter.log[:: max(1, len(adapter.log) // 50)],
               "Training of the adapter, every few steps")
    show_asset(run.store, f"models/{adapter.model_id}", "adapter", logged_steps=len(adapter.log))
    return adapter


def conclude_adapter(run: PersonaliseRun, stage: ConceptLatentStage, adapter: Tuned,
                     times: StageTimes) -> State[dict[str, Any]]:
    """`summary.json`; the end of the flow run with its result as an artifact, and in a sentence as its state."""
    summary = personalise.write_summary(run, stage, adapter, times)
    sentence = (f"Adapter {adapter.model_id} trained on {count_of(summary['used'], 'image')} of {summary['images']:,}, "
                f"gates {summary['final']['gate']:.2g}")
    show_text("result", f"## {sentence}\n\n- adapter: `{adapter.path}`\n\n    {summary['evaluate']}",
              "The adapter, and how models are compared with it")
    get_run_logger().info(sentence)
    return Completed(message=sentence, data=summary)
