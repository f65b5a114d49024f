"""A training as a request: what a worker needs to fine-tune the target or to train the LoRA, wherever it runs."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from hgdpo_core.config import DpoConfig, SftConfig, TrainingConfig
from hgdpo_core.image_sets import ImageSet, offer_images, open_offered_images
from hgdpo_core.models import Model
from hgdpo_core.models.places import find_offered_model, model_means
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.stages.image_latents import cache_image_latents, image_latent_folder
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import FORMAT_VERSION, ShardFolder, format_range, parse_range
from hgdpo_core.training.tune import Tuned, find_tuned, tune_lora, tune_target, tuned_id
from hgdpo_core.training.validation import Validation
from hgdpo_core.version import code_version, refuse_other_code


class TrainRequest(BaseModel):
    """One training, for `run_train`. Survives JSON: it is the parameter of a flow run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: str = Field(description="the object store, as an absolute URL")
    kind: Literal["sft", "dpo"]
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

    @classmethod
    def for_sft(cls, store: Store, images: ImageSet, model: Model, size: tuple[int, int], config: SftConfig, *,
                share: bool = False, validation: Validation | None = None) -> Self:
        """Fine-tune the target on an image set; with `share`, its images are copied into the store for the worker."""
        latents = image_latent_folder(store, images, model, size, flips=config.flip)
        return cls(root=store.root, kind="sft", latents=latents.key, shards=format_range(images.shards),
                   images=offer_images(store, images, share=share), images_id=images.id,
                   validation=validation, **_common(store, model, config, share))

    @classmethod
    def for_dpo(cls, store: Store, model: Model, triplets: ShardFolder, latents: ShardFolder, indices: list[int],
                config: DpoConfig, *, share: bool = False, validation: Validation | None = None) -> Self:
        """Train a LoRA of the target on its triplets."""
        return cls(root=store.root, kind="dpo", latents=latents.key, shards=format_range(indices),
                   triplets=triplets.key, validation=validation, **_common(store, model, config, share))

    @property
    def settings(self) -> TrainingConfig:
        return (SftConfig if self.kind == "sft" else DpoConfig).model_validate(self.config)


def _common(store: Store, model: Model, config: TrainingConfig, share: bool) -> dict[str, Any]:
    return {"model": model.identity(), "means": model_means(store, model, share=share),
            "config": config.model_dump(mode="json"), "code_version": code_version(), "format_version": FORMAT_VERSION}


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
    store, settings = Store(request.root), request.settings
    model = find_offered_model(store, request.model, request.means)
    latents, indices = ShardFolder.open(store, request.latents), parse_range(request.shards)
    if isinstance(settings, DpoConfig):
        assert request.triplets is not None
        return tune_lora(store, model, ShardFolder.open(store, request.triplets), latents, indices, settings,
                         validation=request.validation, progress=progress, should_stop=should_stop)
    assert isinstance(settings, SftConfig)
    return tune_target(store, model, latents, settings, validation=request.validation, progress=progress,
                       should_stop=should_stop)


def encode_images(request: TrainRequest, *, progress: Progress = silent, should_stop: ShouldStop = never_stop) -> None:
    """SFT's first half: the latents of its images, where they are missing. Nothing to do for DPO."""
    refuse_other_code(request.code_version, request.format_version)
    store = Store(request.root)
    latents, indices = ShardFolder.open(store, request.latents), parse_range(request.shards)
    if request.kind == "sft" and latents.completed(indices) != set(indices):
        model = find_offered_model(store, request.model, request.means)
        assert request.images is not None and request.images_id is not None
        images = open_offered_images(store, request.images, request.images_id)
        cache_image_latents(images, latents, model, progress=progress, should_stop=should_stop)
