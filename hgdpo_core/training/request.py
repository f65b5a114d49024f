"""A training as a request: what a worker needs to carry it out, wherever it runs."""

from collections.abc import Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from hgdpo_core.config import TrainingConfig
from hgdpo_core.errors import InputError
from hgdpo_core.models import Model
from hgdpo_core.models.locations import find_located_model, model_locations
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import FORMAT_VERSION, ShardFolder, format_range, parse_range
from hgdpo_core.storage.version import code_version, refuse_other_code
from hgdpo_core.training.objective import OBJECTIVES, find_objective
from hgdpo_core.training.tune import Tuned, find_tuned, tune, tuned_id
from hgdpo_core.training.validation import Validation


class TrainRequest(BaseModel):
    """One training, for `run_train`. It is the parameter of a flow run, as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: str = Field(description="the object store, as an absolute URL")
    kind: str = Field(description="name of the objective, as dpo")
    latents: str = Field(description="key of the folder of latents to train on")
    shards: str = Field(description="which shards of it")
    triplets: str | None = Field(default=None, description="dpo: key of the triplets that the latents were made of")
    model: dict[str, Any] = Field(description="the identity of the model to train")
    locations: dict[str, Any] = Field(description="where that model is, and what the settings name")
    config: dict[str, Any] = Field(description="the settings of the training")
    validation: Validation | None = Field(default=None, description="images to generate during training")
    code_version: str
    format_version: int

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in OBJECTIVES:
            raise ValueError(f"expected one of {', '.join(OBJECTIVES)}")
        return kind

    @classmethod
    def of(cls, kind: str, model: Model, latents: ShardFolder, indices: Sequence[int], config: TrainingConfig, *,
           triplets: ShardFolder | None = None, copy_to_store: bool = False,
           validation: Validation | None = None) -> Self:
        """Train `model` by the objective of that name on shards of latents, which were made of these triplets.

        With `copy_to_store`, a model that is only on this machine is copied into the store for the worker.
        """
        store = latents.store
        locations = model_locations(store, model, copy_to_store=copy_to_store)
        locations |= find_objective(kind).locate(store, config, copy_to_store=copy_to_store)
        return cls(root=store.root, kind=kind, latents=latents.key, shards=format_range(indices),
                   triplets=triplets and triplets.key, model=model.identity(),
                   locations=locations,
                   config=config.model_dump(mode="json"), validation=validation, code_version=code_version(),
                   format_version=FORMAT_VERSION)

    @property
    def settings(self) -> TrainingConfig:
        return find_objective(self.kind).config.model_validate(self.config)

    def open_latents(self) -> tuple[ShardFolder, list[int]]:
        """The folder of latents, and the shards of it to train on."""
        return ShardFolder.open(Store(self.root), self.latents), parse_range(self.shards)


def find_result(request: TrainRequest) -> Tuned | None:
    """The result of the training, None when it does not exist (or its latents do not)."""
    model_id = result_id(request)
    return None if model_id is None else find_tuned(Store(request.root), model_id)


def result_id(request: TrainRequest) -> str | None:
    """The id of the model that the training gives; None while its latents do not exist, which decide it."""
    latents, indices = request.open_latents()
    manifests = latents.manifests(indices)
    if manifests.keys() != set(indices):
        return None
    return tuned_id(request.kind, request.model, latents, indices, request.settings, manifests)


def run_train(request: TrainRequest, *, progress: Progress = silent, should_stop: ShouldStop = never_stop) -> Tuned:
    """Train, from the last checkpoint where there is one; an existing model is returned, not made again.

    ConfigError when this code is not the one that planned it; InputError while latents are missing; StoppedError, with
    a checkpoint, after `should_stop`.
    """
    refuse_other_code(request.code_version, request.format_version)
    latents, indices = request.open_latents()
    missing = set(indices) - latents.completed(indices)
    if missing:
        raise InputError(f"{latents.store.url(latents.key)} lacks {len(missing)} of the {len(indices)} shards to train "
                         "on: run the pipeline again, which makes what is missing")
    model = find_located_model(latents.store, request.model, request.locations)
    settings = find_objective(request.kind).find_located(latents.store, request.settings, request.locations)
    return tune(request.kind, model, latents, indices, settings, request.triplets,
                validation=request.validation, progress=progress, should_stop=should_stop)
