"""Objectives by name: all that a training's way from latents to a kept model, its plan and its report need to know.

`OBJECTIVES` holds one entry an objective. A new one is a class of this shape in a file of its own, its config, and an
entry here; requests, trainings, plans, probes and reports ask it and name none.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hgdpo_core.config import TrainingConfig
from hgdpo_core.errors import ConfigError
from hgdpo_core.models import Backbone, Model
from hgdpo_core.models.sizes import ModelSize
from hgdpo_core.rendering.charts import ChartSpec
from hgdpo_core.statistics.checks import LogCheck
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder
from hgdpo_core.training.data import SampleSource, epoch_order
from hgdpo_core.training.dpo import Dpo
from hgdpo_core.training.parts import Objective, OnLog
from hgdpo_core.training.sft import Sft


class TrainingObjective(Protocol):
    """One way to tune a model. Cheap: it holds no tensors."""

    @property
    def name(self) -> str:
        """Its key in `OBJECTIVES`, the `kind` of its requests, and what the ids of its models begin with."""
        ...

    @property
    def title(self) -> str:
        """What the report calls such a training."""
        ...

    @property
    def config(self) -> type[TrainingConfig]: ...

    @property
    def charts(self) -> Sequence[ChartSpec]:
        """What the report shows of the log's columns, those of `with_derived` among them."""
        ...

    @property
    def checks(self) -> Sequence[LogCheck]:
        """Warnings about a finished training, from its log and the evaluation behind it."""
        ...

    def samples(self, latents: ShardFolder, indices: Sequence[int]) -> SampleSource[Any]:
        """What the training reads, from shards of latents."""
        ...

    def require_fit(self, store: Store, triplets: str | None, samples: SampleSource[Any], indices: Sequence[int],
                    model: Model, config: Any) -> None:
        """InputError for samples that this model should not be trained on; `triplets`: key of what they come from."""
        ...

    def random_batch(self, count: int, latent_shape: Sequence[int], embeds_shape: Sequence[int]) -> Any:
        """A batch as `samples` gives it, of random numbers: what a probe times."""
        ...

    def prepare(self, backbone: Backbone, model: Model, config: Any) -> Objective:
        """What the loop trains of a backbone of `model` in float32, which is changed in place."""
        ...

    def save(self, backbone: Backbone, folder: Path, model_id: str) -> str:
        """Write what was trained into an empty folder; returns the kind of model it is, "lora" or "pipeline"."""
        ...

    def watch(self, warn: Callable[[str], object]) -> OnLog:
        """Called with each log row of a training under way, it warns when something goes wrong."""
        ...

    def with_derived(self, log: Sequence[Mapping[str, float]]) -> Sequence[Mapping[str, float]]:
        """The log with the columns that are computed from others."""
        ...

    def trained_numbers(self, size: ModelSize, config: Any) -> int:
        """How many numbers of a model of that size are trained."""
        ...

    def saved_numbers(self, size: ModelSize, config: Any) -> int:
        """How many the kept model holds."""
        ...


OBJECTIVES: dict[str, TrainingObjective] = {"sft": Sft(), "dpo": Dpo()}


def find_objective(name: str) -> TrainingObjective:
    """The objective of that name; ConfigError for an unknown one."""
    if name not in OBJECTIVES:
        raise ConfigError(f"there is no training objective {name!r}: expected one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


class RandomSamples:
    """Endless random samples of an objective, for a probe."""

    def __init__(self, objective: TrainingObjective, shapes: Mapping[str, Sequence[int]]):
        self._objective, self._shapes = objective, (shapes["latent_shape"], shapes["embeds_shape"])

    def __len__(self) -> int:
        return 1024

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        return epoch_order(len(self), seed, epoch)

    def batch(self, indices: Sequence[int]) -> Any:
        return self._objective.random_batch(len(indices), *self._shapes)
