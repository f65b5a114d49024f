"""A training as a request: what a worker needs to carry it out, wherever it runs."""

from collections.abc import Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from hgdpo_core.config import DpoConfig, SftConfig, TrainingConfig
from hgdpo_core.image_sets import ImageSet, offer_images
from hgdpo_core.models import Model
from hgdpo_core.models.places import find_offered_model, model_means
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.stages.image_latents import image_latent_folder
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import FORMAT_VERSION, ShardFolder, format_range, parse_range
from hgdpo_core.training.data import Origin
from hgdpo_core.training.objective import OBJECTIVES, find_objective
from hgdpo_core.training.tune import Tuned, find_tuned, tune, tuned_id
from hgdpo_core.training.validation import Validation
from hgdpo_core.version import code_version, refuse_other_code


class TrainRequest(BaseModel):
    """One training, for `run_train`. Survives JSON: it is the parameter of a flow run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: str = Field(description="the object store, as an absolute URL")
    kind: str = Field(description="name of the objective: sft, dpo")
    latents: str = Field(description="key of the folder of latents to train on")
    shards: str = Field(description="which shards of it; sft: all that the images fill")
    triplets: str | None = Field(default=None, description="dpo: key of the triplets that the latents were made of")
    images: str | None = Field(default=None, description="sft: folder of captioned images, or its key in the store")
    images_id: str | None = Field(default=None, description="sft: what the images were when this was planned")
    model: dict[str, Any] = Field(description="the identity of the model to train")
    means: dict[str, Any] = Field(description="where that model lies")
    config: dict[str, Any] = Field(description="the settings of the training")
    validation: Validation | None = Field(default=None, description="pictures to draw on the way")
    code_version: str
    format_version: int

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in OBJECTIVES:
            raise ValueError(f"expected one of {', '.join(OBJECTIVES)}")
        return kind

    @classmethod
    def of(cls, kind: str, store: Store, model: Model, latents: ShardFolder, indices: Sequence[int],
           config: TrainingConfig, origin: Origin, *, share: bool = False,
           validation: Validation | None = None) -> Self:
        """Train `model` by the objective of that name on shards of latents; `origin` is what they were made of.

        With `share`, what lies on this machine alone is copied into the store for the worker.
        """
        return cls(root=store.root, kind=kind, latents=latents.key, shards=format_range(list(indices)),
                   triplets=origin.triplets, images=origin.images, images_id=origin.images_id, model=model.identity(),
                   means=model_means(store, model, share=share), config=config.model_dump(mode="json"),
                   validation=validation, code_version=code_version(), format_version=FORMAT_VERSION)

    @classmethod
    def for_sft(cls, store: Store, images: ImageSet, model: Model, size: tuple[int, int], config: SftConfig, *,
                share: bool = False, validation: Validation | None = None) -> Self:
        """Fine-tune the target on an image set; with `share`, its images are copied into the store for the worker."""
        latents = image_latent_folder(store, images, model, size, flips=config.flip)
        origin = Origin(images=offer_images(store, images, share=share), images_id=images.id)
        return cls.of("sft", store, model, latents, list(images.shards), config, origin, share=share,
                      validation=validation)

    @classmethod
    def for_dpo(cls, store: Store, model: Model, triplets: ShardFolder, latents: ShardFolder, indices: list[int],
                config: DpoConfig, *, share: bool = False, validation: Validation | None = None) -> Self:
        """Train a LoRA of the target on its triplets."""
        return cls.of("dpo", store, model, latents, indices, config, Origin(triplets=triplets.key), share=share,
                      validation=validation)

    @property
    def settings(self) -> TrainingConfig:
        return find_objective(self.kind).config.model_validate(self.config)

    @property
    def origin(self) -> Origin:
        return Origin(self.triplets, self.images, self.images_id)


def find_result(request: TrainRequest) -> Tuned | None:
    """What the training gave, None when it is not there (or its latents are not)."""
    model_id = result_id(request)
    return None if model_id is None else find_tuned(Store(request.root), model_id)


def result_id(request: TrainRequest) -> str | None:
    """The id of the model that the training gives; None while its latents are not there, which decide it."""
    store = Store(request.root)
    latents, indices = ShardFolder.open(store, request.latents), parse_range(request.shards)
    manifests = latents.manifests(indices)
    if manifests.keys() != set(indices):
        return None
    return tuned_id(request.kind, request.model, latents, indices, request.settings, manifests)


def run_train(request: TrainRequest, *, progress: Progress = silent, encode_progress: Progress = silent,
              should_stop: ShouldStop = never_stop) -> Tuned:
    """Train, from the last checkpoint where there is one; a model that is there is found, not made.

    ConfigError when this code is not the one that planned it; StoppedError, with a checkpoint, after `should_stop`.
    """
    encode_images(request, progress=encode_progress, should_stop=should_stop)
    store = Store(request.root)
    model = find_offered_model(store, request.model, request.means)
    latents, indices = ShardFolder.open(store, request.latents), parse_range(request.shards)
    return tune(store, request.kind, model, latents, indices, request.settings, request.origin,
                validation=request.validation, progress=progress, should_stop=should_stop)


def encode_images(request: TrainRequest, *, progress: Progress = silent, should_stop: ShouldStop = never_stop) -> None:
    """The latents that are missing, where the objective encodes them itself: the first half of a fine-tuning."""
    refuse_other_code(request.code_version, request.format_version)
    store = Store(request.root)
    latents, indices = ShardFolder.open(store, request.latents), parse_range(request.shards)
    find_objective(request.kind).complete_latents(
        store, request.origin, latents, indices, lambda: find_offered_model(store, request.model, request.means),
        progress, should_stop)
