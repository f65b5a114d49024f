"""Train the LoRA."""

from prefect import task
from prefect.logging import get_run_logger

from hgdpo_core.execution.runner import IN_PROCESS, Runner
from hgdpo_core.models import Model
from hgdpo_core.run import Run
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.request import TrainRequest
from hgdpo_core.training.tune import Tuned
from hgdpo_core.training.validation import Validation
from tasks.options import STAGE
from tasks.triplets import Triplets
from tasks.ui import show_table, stage_progress
from tasks.validation import showing_validation


@task(name="dpo", **STAGE)
def train(run: Run, model: Model, triplets: Triplets, latents: ShardFolder, runner: Runner = IN_PROCESS) -> Tuned:
    """A LoRA of the target by Diffusion-DPO with the statistic matching loss."""
    validation = Validation.of_run(run.config, run.config.dpo, run.evaluation_prompts.prompts)
    request = TrainRequest.for_dpo(run.store, model, triplets.folder, latents, triplets.indices, run.config.dpo,
                                   share=runner.share, validation=validation)
    with stage_progress("DPO") as bar, showing_validation(request, bar) as progress:
        tuned = runner.train(request, progress)
    get_run_logger().info("LoRA: %s %s", "found" if tuned.found else "trained", tuned.path)
    show_table("dpo-log", tuned.log[:: max(1, len(tuned.log) // 50)], "Training of the LoRA, every few steps")
    return tuned
