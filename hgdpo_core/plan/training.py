"""A training in the plan: its steps, its output, and its time, from past trainings or a probe."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hgdpo_core.config import TrainingConfig
from hgdpo_core.devices import default_device, free_memory
from hgdpo_core.errors import StorageError
from hgdpo_core.models import Model, load_backbone
from hgdpo_core.models.published import find_record
from hgdpo_core.models.sizes import FLOAT_BYTES, ModelSize
from hgdpo_core.plan.rates import CHECKPOINTS, OPTIMIZER_FLOATS, Rate
from hgdpo_core.plan.table import StagePlan, readable_time
from hgdpo_core.progress import count_of
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.base import Hooks
from hgdpo_core.training.loop import run_training, step_batch
from hgdpo_core.training.objective import RandomSamples, TrainingObjective

# what determines the time of a step
SAME_STEP = ("batch_size", "gradient_accumulation_steps", "global_batch_size", "gradient_checkpointing")
PROBE_STEPS = 3
LATER_EPOCHS = 16  # of 295 000 pairs in 300 000 steps of 16


@dataclass(frozen=True)
class PlannedTraining:
    """A training to be planned: of `model`, of that size, on images of (width, height) pixels."""

    objective: TrainingObjective
    config: TrainingConfig
    model: Model
    model_size: ModelSize
    size: tuple[int, int]

    def steps(self, samples: int) -> int:
        """Optimizer steps, by one process where the config names no global batch."""
        return self.config.max_steps or math.ceil(self.config.epochs * samples / step_batch(self.config))

    def describe_length(self, samples: int, planned: StagePlan) -> str:
        """The length that is set, and that of the paper's version 3, each with its time where that is known."""
        epochs = planned.total * step_batch(self.config) / max(1, samples)
        long = math.ceil(LATER_EPOCHS * samples / step_batch(self.config))
        time_of = (f", {readable_time(planned.seconds)} and {readable_time(planned.seconds * long / planned.total)}"
                   if planned.seconds else "")
        how = f"dpo.epochs={LATER_EPOCHS}{' and dpo.max_steps=null' if self.config.max_steps else ''}"
        return (f"length of training: {count_of(planned.total, 'step')} of DPO are {epochs:.3g} epochs. The paper "
                f"names no length; its version 3 trains some {LATER_EPOCHS} epochs, here "
                f"{count_of(long, 'step')}{time_of}: to try that set {how}")

    def bytes(self) -> int:
        """Bytes of its output in the store: the model and its last checkpoints."""
        trained = self.objective.trained_numbers(self.model_size, self.config)
        saved = self.objective.saved_numbers(self.model_size, self.config)
        return FLOAT_BYTES * (saved + CHECKPOINTS * OPTIMIZER_FLOATS * trained)

    def row(self, store: Store, model_id: str, samples: int, record: Mapping[str, Any] | None,
            step: Callable[[], Rate | None]) -> StagePlan:
        """The plan's row; `record` is the model's, None if it is not trained yet, `model_id` "" if it is not known.

        `step` returns the rate of a step, None if it is not known; it is called only for a missing training.
        """
        steps, rate = self.steps(samples), Rate(0.0, "") if record else step()
        existing = sum(count for _, count, _ in store.walk(f"models/{model_id}")) if record else 0
        return StagePlan(
            stage=self.objective.name, unit="steps", total=steps, missing=0 if record else steps, shards=0,
            missing_shards=0, bytes_found=existing, bytes_missing=0 if record else self.bytes(),
            seconds=steps * rate.seconds if rate else None, basis=rate.basis if rate else "",
            folder=f"models/{model_id}" if model_id else "")

    def probed(self, device_name: str) -> Rate:
        """A step on noise, timed on this machine's device: the later ones of a few, in memory, without a checkpoint."""
        free_memory()
        backbone = load_backbone(self.model, default_device(), dtype="float32")
        moments: list[float] = []
        config = self.objective.average_step(self.config).model_copy(
            update={"max_steps": PROBE_STEPS, "flip": False})  # flips are made with latents
        samples = RandomSamples(self.objective, backbone.shapes(self.size))
        run_training(self.objective.prepare(backbone, self.model, config), samples, config, None,
                     Hooks(lambda done, total, unit: moments.append(time.monotonic())))
        # the first moment is before, the second after the first step
        return Rate((moments[-1] - moments[1]) / (PROBE_STEPS - 1), f"steps timed on {device_name}")

    def past(self, store: Store) -> Rate | None:
        """A step of an earlier training in the store with the same batch and image size."""
        for model_id in store.list_folders("models"):
            with contextlib.suppress(StorageError, KeyError):   # unreadable
                record = find_record(store, model_id) if model_id.startswith(f"{self.objective.name}-") else None
                if record and record["steps"] and self._is_alike(store, model_id):
                    seconds = record["seconds"] / record["steps"]
                    return Rate(seconds, f"the training of {model_id} on {record['device']}")
        return None

    def _is_alike(self, store: Store, model_id: str) -> bool:
        made: dict[str, Any] = store.read_object(f"models/{model_id}/config.json", latents=str, config=dict)
        latents = ShardFolder.open(store, made["latents"]).config
        return (latents["width"], latents["height"]) == self.size and all(
            made["config"][name] == getattr(self.config, name) for name in SAME_STEP)
