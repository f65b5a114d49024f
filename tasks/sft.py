"""Fine-tune the target on the user's images, where there are images."""

from functools import partial

from prefect import task
from prefect.logging import get_run_logger

from hgdpo_core import pipeline
from hgdpo_core.execution.runner import Runner
from hgdpo_core.models import Model
from hgdpo_core.progress import StageProgress
from hgdpo_core.run import Run
from hgdpo_core.stages.image_latents import find_set_aside
from hgdpo_core.training.parts import LogRow
from tasks.options import STAGE
from tasks.ui import show_table
from tasks.validation import training_progress


@task(name="sft", **STAGE)
def tune_target(run: Run, runner: Runner, on: StageProgress) -> tuple[Model, list[LogRow]]:
    """The target for all later stages, and the training log (empty without images)."""
    logger = get_run_logger()
    model, log = pipeline.tune_target(run, runner, on, partial(training_progress, on=on))
    if run.images is None:
        logger.info("No images: the target stays as it is")
        return model, log
    logger.info("SFT: %s", model.path.name)
    latents = pipeline.image_latent_stage(run).folder
    skipped = find_set_aside(latents, len(run.images))
    if skipped.describe():
        logger.warning("Images for SFT: %s; %s/rejected lists them", skipped.describe(),
                       latents.store.url(latents.key))
        show_table("images-set-aside", skipped.reasons, skipped.describe())
    return model, log
