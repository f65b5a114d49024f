"""A training in the plan: its steps, what it leaves behind, and how long that takes."""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hgdpo_core.config import TrainingConfig
from hgdpo_core.errors import StorageError
from hgdpo_core.models import Model
from hgdpo_core.models.published import find_record
from hgdpo_core.models.sizes import FLOAT_BYTES, ModelSize
from hgdpo_core.plan import probe, rates
from hgdpo_core.plan.rates import Rate
from hgdpo_core.plan.table import StagePlan
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.objective import TrainingObjective

SAME_STEP = ("batch_size", "gradient_accumulation_steps", "gradient_checkpointing")  # decide what a step takes


@dataclass(frozen=True)
class PlannedTraining:
    """A training as a plan needs it: of `model`, of that size, on images of (width, height) pixels."""

    objective: TrainingObjective
    config: TrainingConfig
    model: Model
    model_size: ModelSize
    size: tuple[int, int]

    def steps(self, samples: int) -> int:
        """Optimizer steps of one process."""
        batch = self.config.batch_size * self.config.gradient_accumulation_steps
        return self.config.max_steps or math.ceil(self.config.epochs * samples / batch)

    def bytes(self) -> int:
        """What it leaves in the store: the model and its last checkpoints."""
        trained = self.objective.trained_numbers(self.model_size, self.config)
        checkpoints = rates.CHECKPOINTS * rates.OPTIMIZER_FLOATS * trained
        return FLOAT_BYTES * (self.objective.saved_numbers(self.model_size, self.config) + checkpoints)

    def row(self, store: Store, model_id: str, samples: int, record: Mapping[str, Any] | None,
            step: Callable[[], Rate | None]) -> StagePlan:
        """The plan's row; `record` is the model's, None where it is not made, and `model_id` "" where it is not known.

        `step` says what a step takes, None where that is not known, and is asked for what is missing.
        """
        steps, rate = self.steps(samples), Rate(0.0, "") if record else step()
        held = sum(count for _, count, _ in store.walk(f"models/{model_id}")) if record else 0
        return StagePlan(
            stage=self.objective.name, unit="steps", total=steps, missing=0 if record else steps, shards=0,
            missing_shards=0, bytes_found=held, bytes_missing=0 if record else self.bytes(),
            seconds=steps * rate.seconds if rate else None, basis=rate.basis if rate else "",
            folder=f"models/{model_id}" if model_id else "")

    def probed(self, device_name: str) -> Rate:
        """A step, timed on this machine's device."""
        return Rate(probe.step_seconds(self.model, self.objective, self.config, self.size),
                    f"steps timed on {device_name}")

    def past(self, store: Store) -> Rate | None:
        """A step of a model in the store whose training had the same batch and image size."""
        for model_id in store.list_folders("models"):
            with contextlib.suppress(StorageError, KeyError):   # one that cannot be read tells nothing
                record = find_record(store, model_id) if model_id.startswith(f"{self.objective.name}-") else None
                if record and record["steps"] and self._is_alike(store, model_id):
                    seconds = record["seconds"] / record["steps"]
                    return Rate(seconds, f"the training of {model_id} on {record['device']}")
        return None

    def _is_alike(self, store: Store, model_id: str) -> bool:
        made: dict[str, Any] = store.read_json(f"models/{model_id}/config.json")
        latents = ShardFolder.open(store, made["latents"]).config
        return (latents["width"], latents["height"]) == self.size and all(
            made["config"][name] == getattr(self.config, name) for name in SAME_STEP)
