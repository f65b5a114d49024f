"""Train the LoRA."""

from functools import partial

from prefect import task
from prefect.logging import get_run_logger

from hgdpo_core import pipeline
from hgdpo_core.execution.runner import Runner
from hgdpo_core.models import Model
from hgdpo_core.progress import StageProgress
from hgdpo_core.run import Run
from hgdpo_core.stages.latents import LatentStage
from hgdpo_core.stages.triplets import TripletStage
from hgdpo_core.training.tune import Tuned
from tasks.options import STAGE
from tasks.ui import show_table
from tasks.validation import training_progress


@task(name="dpo", **STAGE)
def train_lora(run: Run, model: Model, triplets: TripletStage, latents: LatentStage, runner: Runner,
               on: StageProgress) -> Tuned:
    """A LoRA of the target by Diffusion-DPO with the statistic matching loss."""
    lora = pipeline.train_lora(run, model, triplets, latents, runner, on, partial(training_progress, on=on))
    get_run_logger().info("LoRA: %s %s", "existing" if lora.found else "trained", lora.path)
    show_table("dpo-log", lora.log[:: max(1, len(lora.log) // 50)], "Training of the LoRA, every few steps")
    return lora
