"""Fine-tune the target on the user's images, where there are images."""

from prefect import task
from prefect.logging import get_run_logger

from hgdpo_core.execution.runner import IN_PROCESS, Runner
from hgdpo_core.models import Model
from hgdpo_core.run import Run
from hgdpo_core.stages.image_latents import find_set_aside
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.request import TrainRequest
from hgdpo_core.training.tune import find_tuned_target
from hgdpo_core.training.validation import Validation
from tasks.options import STAGE
from tasks.ui import show_table, stage_progress
from tasks.validation import showing_validation


@task(name="sft", **STAGE)
def fine_tune(run: Run, runner: Runner = IN_PROCESS) -> tuple[Model, list[dict[str, float]]]:
    """The target for all later stages, and the training log (empty without images)."""
    logger = get_run_logger()
    if run.images is None:
        logger.info("No images: the target stays as it is")
        return run.target, []
    size = (run.config.sampler.width, run.config.sampler.height)
    validation = Validation.of_run(run.config, run.config.sft, run.evaluation_prompts.prompts)
    request = TrainRequest.for_sft(run.store, run.images, run.target, size, run.config.sft, share=runner.share,
                                   validation=validation)
    with (stage_progress("encode") as encoding, stage_progress("SFT") as bar,
          showing_validation(request, bar) as progress):
        tuned = runner.train(request, progress, encoding)
    latents = ShardFolder.open(run.store, request.latents)
    logger.info("SFT: %s %s", "found" if tuned.found else "trained", tuned.model_id)
    aside = find_set_aside(latents, len(run.images))
    if aside.describe():
        logger.warning("Images for SFT: %s; %s/rejected lists them", aside.describe(), latents.store.url(latents.key))
        show_table("images-set-aside", aside.reasons, aside.describe())
    return find_tuned_target(run.target, tuned), tuned.log
