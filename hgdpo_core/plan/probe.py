"""A timed probe of a training: a few steps on noise on this machine's device, thrown away."""

import time

from hgdpo_core.config import TrainingConfig
from hgdpo_core.models import Model, default_device, load_backbone
from hgdpo_core.models.memory import free_memory
from hgdpo_core.training import Hooks
from hgdpo_core.training.loop import run_training
from hgdpo_core.training.objective import RandomSamples, TrainingObjective

STEPS = 3


def step_seconds(model: Model, training: TrainingObjective, config: TrainingConfig, size: tuple[int, int]) -> float:
    """Seconds of one optimizer step on noise: the later ones of a few, in memory, without a checkpoint."""
    free_memory()
    backbone = load_backbone(model, default_device(), dtype="float32")
    moments: list[float] = []
    config = config.model_copy(update={"max_steps": STEPS, "flip": False})  # flips cost when latents are made

    def clock(done: int, total: int, unit: str) -> None:
        moments.append(time.monotonic())

    samples = RandomSamples(training, backbone.shapes(size))
    run_training(training.prepare(backbone, model, config), samples, config, None, Hooks(clock))
    return (moments[-1] - moments[1]) / (STEPS - 1)  # the first moment is before, the second after the first step
