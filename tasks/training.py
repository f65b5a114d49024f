"""Train models: the steps of a run, and the work of a training flow run."""

from functools import partial

from prefect.logging import get_run_logger

from hgdpo_core import pipeline
from hgdpo_core.execution.runner import Runner
from hgdpo_core.models import Model
from hgdpo_core.progress import ShouldStop, StageProgress
from hgdpo_core.run import Run
from hgdpo_core.stages.image_latents import find_skipped
from hgdpo_core.stages.latents import LatentStage
from hgdpo_core.stages.prompt_embeds import PromptEmbedStage
from hgdpo_core.training.launch import run_train_everywhere
from hgdpo_core.training.parts import LogRow
from hgdpo_core.training.request import TrainRequest
from hgdpo_core.training.tune import Tuned
from tasks.assets import show_asset
from tasks.options import stage_task
from tasks.ui import show_table
from tasks.validation import training_progress


@stage_task("sft")
def tune_target(run: Run, runner: Runner, on: StageProgress) -> tuple[Model, list[LogRow]]:
    """The target for all later stages, and the training log (empty without images)."""
    logger = get_run_logger()
    model, log = pipeline.tune_target(run, runner, on, partial(training_progress, on=on))
    if run.images is None:
        logger.info("No images: the target stays as it is")
        return model, log
    logger.info("SFT: %s", model.path.name)
    latents = pipeline.image_latent_stage(run).folder
    show_asset(run.store, f"models/{model.path.name}", "fine-tuned model", images=len(run.images))
    skipped = find_skipped(latents, len(run.images))
    if skipped.describe():
        logger.warning("Images for SFT: %s; %s/rejected lists them", skipped.describe(),
                       latents.store.url(latents.key))
        show_table("images-set-aside", skipped.reasons, skipped.describe())
    return model, log


@stage_task("lora", "{run.config.objective}")
def train_lora(run: Run, model: Model, data: LatentStage | PromptEmbedStage, runner: Runner,
               on: StageProgress) -> Tuned:
    """A LoRA of the target by the run's objective: Diffusion-DPO with the statistic matching loss, or another."""
    lora = pipeline.train_lora(run, model, data, runner, on, partial(training_progress, on=on))
    get_run_logger().info("LoRA: %s %s", "existing" if lora.existing else "trained", lora.path)
    show_table(f"{run.config.objective.replace('_', '-')}-log", lora.log[:: max(1, len(lora.log) // 50)],
               "Training of the LoRA, every few steps")
    sources = [data.triplets.key] if isinstance(data, LatentStage) else []
    show_asset(run.store, f"models/{lora.model_id}", "LoRA", sources, objective=run.config.objective,
               logged_steps=len(lora.log))
    return lora


@stage_task("train", "{request.kind}")
def make_tuned(request: TrainRequest, should_stop: ShouldStop) -> str:
    """The id of the tuned model in `models/`."""
    with training_progress(request) as progress:
        tuned = run_train_everywhere(request, progress=progress, should_stop=should_stop)
    get_run_logger().info("%s: %s %s", request.kind, "existing" if tuned.existing else "trained", tuned.model_id)
    return tuned.model_id
