"""What training reads instead of images: latents and text embeddings, made once and kept in shards.

Latents are scaling_factor * posterior mean, float32; where flips are requested, of the mirrored image too, since the
mirrored latent of an image is not the latent of its mirror image. Conditioning is exactly the embedding that the
sampler used: from the same text encoder in the same precision, of the same length. Long prompts have longer embeddings
than others, so a row's length gives its number of chunks, and a batch of several lengths is padded and masked.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch

from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import InputError
from hgdpo_core.images import decode_image, to_model_range
from hgdpo_core.models import Backbone, Model
from hgdpo_core.models.locations import find_located_model
from hgdpo_core.stages.base import Advance, Computer, ShardRows, Worker, prepare_batches
from hgdpo_core.stages.encoding import EncodingStage, latent_settings, prompt_columns, row_bytes, with_pooled
from hgdpo_core.stages.pair_sets import PairSetStage
from hgdpo_core.stages.probes import ENCODE_BATCH
from hgdpo_core.stages.triplets import TripletStage
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder

SCHEMA = pa.schema([("prompt_id", pa.string()), ("winner", pa.binary()), ("loser", pa.binary()),
                    ("prompt_embeds", pa.binary())])
PAIRS = pa.schema([("prompt_id", pa.string()), ("caption", pa.string()), ("jpg_0", pa.binary()),
                   ("jpg_1", pa.binary())])
"""Of a data set of pairs, what is needed here."""
IMAGES = {"winner": "jpg_0", "loser": "jpg_1"}  # columns of latents, and of the images that they are of
MIRRORED = ("winner_mirrored", "loser_mirrored")  # columns of a folder with flips


def latent_folder(store: Store, triplets: ShardFolder, model: Model, size: tuple[int, int], *,
                  flips: bool = False) -> ShardFolder:
    """The folder of a data set's latents by a model's VAE and text encoder; size is (width, height) in pixels.

    With `flips` it holds those of the mirrored images too.
    """
    settings = {**latent_settings("latents", model, size), "triplets": triplets.key, **model.syntax()}
    if model.syntax():  # a negative prompt of several chunks makes prompts as long
        settings["negative_prompt"] = model.negative_prompt
    if flips:
        settings["flips"] = True
    settings |= model.encoding()
    dataset = triplets.key.split("/")[-1]
    return ShardFolder.create(store, f"latents/{dataset}/{content_hash(settings)}", settings)


@dataclass(frozen=True)
class LatentStage(EncodingStage):
    """Latents and text embeddings of a data set's shards."""

    name, unit, doing = "latents", "pairs", "encoding latents"
    reads, read_schemas = ("triplets",), (PAIRS,)

    triplets: ShardFolder
    folder: ShardFolder
    model: Model
    requested: tuple[int, ...]
    title: str = "latents"
    expected: Mapping[int, int] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, triplets: TripletStage | PairSetStage, model: Model, *, flips: bool = False) -> Self:
        """The latents of a planned data set, whose shards hold at most a pair per prompt, or per row of its source."""
        folder = latent_folder(triplets.folder.store, triplets.folder, model, triplets.image_size, flips=flips)
        indices = triplets.indices
        return cls(triplets.folder, folder, model, tuple(indices), expected=triplets.units(indices, [{}]))

    @classmethod
    def open(cls, folder: ShardFolder, recipe: Mapping[str, Any], indices: Sequence[int]) -> Self:
        return cls(ShardFolder.open(folder.store, folder.config["triplets"]), folder,
                   find_located_model(folder.store, folder.config, recipe), tuple(indices))

    def load(self, worker: Worker) -> AbstractContextManager[Computer]:
        return nullcontext(_Encoding(self.backbone(worker.device), self.size, self.flips, ENCODE_BATCH))

    @property
    def images_per_shard(self) -> int:
        first = self.triplets.find(self.requested[0]) if self.requested else None
        return 2 * first.rows if first and first.rows else 1

    @property
    def images_per_unit(self) -> int:
        return 4 if self.flips else 2


@dataclass
class _Encoding(Computer):
    """A codec and a text encoder that fill shards."""

    backbone: Backbone
    size: tuple[int, int]
    flips: bool
    batch_size: int | None

    def batches(self, index: int, tables: Sequence[pa.Table]) -> Iterator[tuple[str, torch.Tensor]]:
        """Column of the table, and pixels float32 [B, 3, H, W] in [-1, 1]."""
        for name, column in IMAGES.items():
            images = (image.as_py() for image in tables[0][column])
            for batch in prepare_batches(self._prepare, images, self.batch_size):
                yield name, torch.from_numpy(np.stack(batch))

    def compute(self, index: int, tables: Sequence[pa.Table], batches: Iterator[Any], worker: Worker,
                advance: Advance) -> ShardRows:
        (rows,) = tables
        texts = prompt_columns(self.backbone, rows["caption"].to_pylist())
        latents: dict[str, list[bytes]] = {name: [] for name in (*IMAGES, *(MIRRORED if self.flips else ()))}
        for name, pixels in batches:
            latents[name] += row_bytes(self.backbone.codec.encode(pixels))
            if self.flips:
                latents[f"{name}_mirrored"] += row_bytes(self.backbone.codec.encode(pixels.flip(-1)))
        schema = pa.schema([*with_pooled(SCHEMA, self.backbone),
                            *((name, pa.binary()) for name in MIRRORED if self.flips)])
        advance(rows.num_rows)
        return ShardRows(pa.table({"prompt_id": rows["prompt_id"], **texts, **latents}, schema=schema),
                         details=self.backbone.shapes(self.size))

    def _prepare(self, data: bytes) -> np.ndarray:
        image = decode_image(data)
        if image.size != self.size:
            raise InputError(f"a triplet's image is {image.width}x{image.height} pixels, expected "
                             f"{self.size[0]}x{self.size[1]}")
        return to_model_range(image)
