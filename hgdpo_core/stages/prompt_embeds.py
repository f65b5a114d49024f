"""Text embeddings of prompts, for a training that has no images: made once and kept in shards."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import pyarrow as pa

from hgdpo_core.config.base import content_hash
from hgdpo_core.models import Backbone, Model, load_backbone
from hgdpo_core.models.locations import find_located_model, model_locations
from hgdpo_core.models.sizes import FLOAT_BYTES, ModelSize
from hgdpo_core.prompts import PromptList, load_prompts, prompt_id, save_prompts
from hgdpo_core.stages.base import Advance, Computer, ShardRows, Stage, Worker
from hgdpo_core.stages.encoding import latent_settings, prompt_columns, with_pooled
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder, ShardManifest

SCHEMA = pa.schema([("prompt_id", pa.string()), ("prompt", pa.string()), ("prompt_embeds", pa.binary())])
PROMPTS_PER_SHARD = 256


@dataclass(frozen=True)
class PromptEmbedStage(Stage):
    """The embeddings of a list of prompts by a model's text encoder, exactly those that the sampler is given."""

    name, unit, doing = "prompt_embeds", "prompts", "embedding prompts"

    prompts: tuple[str, ...]
    folder: ShardFolder
    model: Model
    requested: tuple[int, ...]
    title: str = "prompt embeddings"

    @classmethod
    def of(cls, store: Store, prompts: PromptList, model: Model, size: tuple[int, int]) -> Self:
        """Of a run's prompts; `size`: (width, height) of the images that a training will sample."""
        save_prompts(store, prompts)
        settings = {**latent_settings("prompt_embeds", model, size), "prompts_id": prompts.id, **model.syntax(),
                    "negative_prompt": model.negative_prompt}
        folder = ShardFolder.create(store, f"latents/{prompts.id}/{content_hash(settings)}", settings)
        shards = -(-len(prompts.prompts) // PROMPTS_PER_SHARD)
        return cls(tuple(prompts.prompts), folder, model, tuple(range(shards)))

    @classmethod
    def open(cls, folder: ShardFolder, recipe: Mapping[str, Any], indices: Sequence[int]) -> Self:
        prompts = load_prompts(folder.store, folder.config["prompts_id"])
        return cls(tuple(prompts.prompts), folder, find_located_model(folder.store, folder.config, recipe),
                   tuple(indices))

    def recipe(self, *, copy_to_store: bool = False) -> dict[str, Any]:
        return model_locations(self.folder.store, self.model, copy_to_store=copy_to_store)

    def load(self, worker: Worker) -> AbstractContextManager[Computer]:
        return nullcontext(_Embedding(self, load_backbone(self.model, worker.device)))

    def units(self, indices: Iterable[int], sources: Sequence[Mapping[int, ShardManifest]] = ()) -> dict[int, int]:
        return {index: len(self.of_shard(index)) for index in indices}

    def of_shard(self, index: int) -> Sequence[str]:
        """The prompts of a shard."""
        return self.prompts[index * PROMPTS_PER_SHARD:(index + 1) * PROMPTS_PER_SHARD]

    @property
    def images_per_shard(self) -> int:
        return PROMPTS_PER_SHARD

    def first_prompts(self, index: int) -> Sequence[str]:
        return self.of_shard(index)

    def unit_bytes(self, size: ModelSize, image_bytes: float) -> float:
        return FLOAT_BYTES * size.text_numbers


@dataclass
class _Embedding(Computer):
    """A text encoder that fills shards."""

    stage: PromptEmbedStage
    backbone: Backbone
    batch_size: int | None = None

    def compute(self, index: int, tables: Sequence[pa.Table], batches: Iterator[Any], worker: Worker,
                advance: Advance) -> ShardRows:
        worker.check_stop(PromptEmbedStage.doing)
        prompts = list(self.stage.of_shard(index))
        texts = prompt_columns(self.backbone, prompts)
        advance(len(prompts))
        size = self.stage.folder.config["width"], self.stage.folder.config["height"]
        return ShardRows(pa.table({"prompt_id": [prompt_id(prompt) for prompt in prompts], "prompt": prompts, **texts},
                                  schema=with_pooled(SCHEMA, self.backbone)), details=self.backbone.shapes(size))
