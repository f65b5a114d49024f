"""Fine-tune the target on the user's images, where there are images."""

from prefect import task
from prefect.logging import get_run_logger

from hgdpo_core.models import Model
from hgdpo_core.run import Run
from hgdpo_core.sft_images import cache_image_latents, image_latent_folder
from hgdpo_core.tuning import find_tuned_target, tune_target
from tasks.options import STAGE
from tasks.ui import stage_progress


@task(name="sft", **STAGE)
def fine_tune(run: Run) -> tuple[Model, list[dict[str, float]]]:
    """The target for all later stages, and the training log (empty without images)."""
    logger = get_run_logger()
    if run.images is None:
        logger.info("No images: the target stays as it is")
        return run.target, []
    size = (run.config.sampler.width, run.config.sampler.height)
    latents = image_latent_folder(run.store, run.images, run.target, size)
    with stage_progress("encode") as progress:
        encoded = cache_image_latents(run.images, latents, run.target, progress=progress)
    rejected = sum(manifest.details["rejected"] for manifest in latents.manifests().values())
    logger.info("SFT images: %d encoded now, %d set aside in %s/rejected", encoded, rejected, latents.key)
    with stage_progress("SFT") as progress:
        tuned = tune_target(run.store, run.target, latents, run.config.sft, progress=progress)
    logger.info("SFT: %s %s", "found" if tuned.found else "trained", tuned.model_id)
    return find_tuned_target(run.target, tuned), tuned.log
