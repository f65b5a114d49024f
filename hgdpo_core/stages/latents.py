"""What training reads instead of images: latents and text embeddings, made once and kept in shards.

Latents are scaling_factor * posterior mean, float32; where flips are wanted, of the mirrored image too, since the
mirrored latent of an image is not the latent of its mirror image. Conditioning is exactly the embedding that the
sampler used: from the same text encoder in the same precision, of the same length. Long prompts have longer embeddings
than others, so a row's length says how many chunks it holds, and a batch of several lengths is padded and masked.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import torch

from hgdpo_core.config import content_hash
from hgdpo_core.devices import default_device
from hgdpo_core.errors import InputError
from hgdpo_core.images import decode_image, to_model_range
from hgdpo_core.models import Backbone, Model, load_backbone
from hgdpo_core.models.places import find_offered_model, model_means
from hgdpo_core.models.sizes import ModelSize
from hgdpo_core.parallel import threads
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.stages.base import Computer, Probe, ShardRows, Stage, Worker
from hgdpo_core.stages.probes import ENCODE_BATCH, probe_encoding
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder, ShardManifest

SCHEMA = pa.schema([("prompt_id", pa.string()), ("winner", pa.binary()), ("loser", pa.binary()),
                    ("prompt_embeds", pa.binary())])
MIRRORED = ("winner_mirrored", "loser_mirrored")  # columns of a folder with flips


def latent_folder(store: Store, triplets: ShardFolder, model: Model, size: tuple[int, int], *,
                  flips: bool = False) -> ShardFolder:
    """Where the latents of a data set by a model's VAE and text encoder lie; size is (width, height) in pixels.

    With `flips` it holds those of the mirrored images too.
    """
    settings = {"stage": "latents", "triplets": triplets.key, "fingerprint": model.fingerprint, "dtype": model.dtype,
                "clip_skip": model.clip_skip, "width": size[0], "height": size[1], **model.syntax()}
    if model.syntax():  # a negative prompt of several chunks makes prompts as long
        settings["negative_prompt"] = model.negative_prompt
    if flips:
        settings["flips"] = True
    settings |= model.encoding()
    dataset = triplets.key.split("/")[-1]
    return ShardFolder.create(store, f"latents/{dataset}/{content_hash(settings)}", settings)


@dataclass(frozen=True)
class LatentStage(Stage):
    """Latents and text embeddings of a data set's shards."""

    name: ClassVar[str] = "latents"
    unit: ClassVar[str] = "pairs"
    doing: ClassVar[str] = "encoding latents"

    triplets: ShardFolder
    folder: ShardFolder
    model: Model
    requested: tuple[int, ...]
    title: str = "latents"
    pairs: Mapping[int, int] = field(default_factory=dict, repr=False)
    """The most pairs that each shard will hold, where a plan knows it."""

    @property
    def indices(self) -> list[int]:
        return list(self.requested)

    @property
    def sources(self) -> tuple[ShardFolder, ...]:
        return (self.triplets,)

    def units(self, indices: Iterable[int], sources: Sequence[Mapping[int, ShardManifest]]) -> dict[int, int]:
        return {index: sources[0][index].rows if index in sources[0] else self.pairs.get(index, 0)
                for index in indices}

    def recipe(self, *, copy_to_store: bool = False) -> dict[str, Any]:
        return model_means(self.folder.store, self.model, share=copy_to_store)

    @classmethod
    def open(cls, folder: ShardFolder, recipe: Mapping[str, Any], indices: Sequence[int]) -> Self:
        return cls(ShardFolder.open(folder.store, folder.config["triplets"]), folder,
                   find_offered_model(folder.store, folder.config, recipe), tuple(indices))

    @contextmanager
    def load(self, worker: Worker) -> Iterator[Computer]:
        config = self.folder.config
        yield _Encoding(load_backbone(self.model, worker.device, codec_dtype="float32"),
                        (config["width"], config["height"]), config.get("flips", False))

    @property
    def images_per_shard(self) -> int:
        first = self.triplets.find(self.requested[0]) if self.requested else None
        return 2 * first.rows if first and first.rows else 1

    @property
    def work(self) -> str:
        return "encode"

    @property
    def images_per_unit(self) -> int:
        return 4 if self.folder.config.get("flips") else 2

    def probe(self) -> Probe | None:
        return probe_encoding(self.model, (self.folder.config["width"], self.folder.config["height"]))

    def unit_bytes(self, size: ModelSize, image_bytes: float) -> float:
        return size.latent_bytes((self.folder.config["width"], self.folder.config["height"]), self.images_per_unit)


class _Encoding:
    """A codec and a text encoder that fill shards."""

    def __init__(self, backbone: Backbone, size: tuple[int, int], flips: bool):
        self._backbone, self._size, self._flips = backbone, size, flips
        self.batch_size: int | None = ENCODE_BATCH

    def compute(self, index: int, tables: Sequence[pa.Table], worker: Worker,
                advance: Callable[[int], None]) -> ShardRows:
        (rows,) = tables
        texts = self._backbone.text.encode(rows["caption"].to_pylist())
        table = pa.table({
            "prompt_id": rows["prompt_id"], "winner": self._encode(rows["jpg_0"].to_pylist(), worker),
            "loser": self._encode(rows["jpg_1"].to_pylist(), worker),
            "prompt_embeds": [text.embeds[0].float().cpu().numpy().tobytes() for text in texts]}, schema=SCHEMA)
        for name, images in zip(MIRRORED, ("jpg_0", "jpg_1"), strict=True) if self._flips else ():
            mirrored = self._encode(rows[images].to_pylist(), worker, mirror=True)
            table = table.append_column(pa.field(name, pa.binary()), [mirrored])
        advance(rows.num_rows)
        return ShardRows(table, details=self._backbone.shapes(self._size))

    def _encode(self, images: list[bytes], worker: Worker, *, mirror: bool = False) -> list[bytes]:
        assert self.batch_size is not None
        encoded: list[bytes] = []
        for start in range(0, len(images), self.batch_size):
            worker.check_stop(LatentStage.doing)
            pictures = list(threads().map(decode_image, images[start:start + self.batch_size]))
            wrong = next((picture.size for picture in pictures if picture.size != self._size), None)
            if wrong:
                raise InputError(f"a triplet's image is {wrong[0]}x{wrong[1]} pixels, expected "
                                 f"{self._size[0]}x{self._size[1]}")
            pixels = torch.from_numpy(np.stack([to_model_range(picture) for picture in pictures]))
            latents = self._backbone.codec.encode(pixels.flip(-1) if mirror else pixels)
            encoded += [row.numpy().tobytes() for row in latents]
        return encoded


def cache_latents(triplets: ShardFolder, latents: ShardFolder, model: Model, indices: Sequence[int], *,
                  device: str | None = None, progress: Progress = silent,
                  should_stop: ShouldStop = never_stop) -> int:
    """Encode the missing shards among `indices` here; returns the number of pairs encoded."""
    stage = LatentStage(triplets, latents, model, tuple(indices))
    return stage.make(Worker(device or default_device(), progress, should_stop))
