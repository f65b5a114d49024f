"""The user's own images for SFT: checked, encoded once, kept in shards; the unusable skipped with its reason."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import InputError
from hgdpo_core.image_sets import locate_images, open_located_images
from hgdpo_core.image_sets.sets import CAPTIONING, ImageSet, Kind
from hgdpo_core.images import decode_image, fit_image, to_model_range
from hgdpo_core.models import Backbone, Model
from hgdpo_core.models.locations import find_located_model
from hgdpo_core.parallel import thread_map
from hgdpo_core.stages.base import Advance, Computer, ShardRows, Worker
from hgdpo_core.stages.encoding import EncodingStage, latent_settings, row_bytes, text_columns, with_pooled
from hgdpo_core.stages.probes import ENCODE_BATCH
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder, ShardManifest, read_table

SMALLEST_SCALE = 0.5
PIXELS_VERSION = 2
"""In the settings of sets with profiles or transparency, whose pixels were different before: sRGB, on white."""
Captioned = tuple[str, str, np.ndarray, tuple[int, ...], bytes]
"""Name, caption, float32 [3, H, W] in [-1, 1] and `sizes_of` of an image; with concepts, the PNG of its own."""
ReadConcept = Callable[[Image.Image, str], bytes]
"""The concept of an image and its caption, as PNG; InputError for one that has none, or several."""
SCHEMA = pa.schema([("file_name", pa.string()), ("caption", pa.string()), ("latents", pa.binary()),
                    ("prompt_embeds", pa.binary())])
MIRRORED = pa.field("mirrored", pa.binary())  # of a folder with flips
CONCEPT = pa.field("concept", pa.binary())  # of a folder with concepts
SIZES_COLUMN = pa.field("sizes", pa.binary())  # of families whose network reads them, six float32
REJECTED_SCHEMA = pa.schema([("file_name", pa.string()), ("reason", pa.string())])


def image_latent_folder(store: Store, images: ImageSet, model: Model, size: tuple[int, int], *,
                        flips: bool = False) -> ShardFolder:
    """The folder of an image set's latents by a model's VAE and text encoder; size is (width, height) in pixels.

    With `flips` it holds those of the mirrored images too.
    """
    settings = {**latent_settings("image_latents", model, size), "images_id": images.id}
    if flips:
        settings["flips"] = True
    if images.converted:
        settings["pixels"] = PIXELS_VERSION
    settings |= model.encoding()
    return ShardFolder.create(store, f"latents/images-{images.id}/{content_hash(settings)}", settings)


@dataclass(frozen=True)
class ImageLatentStage(EncodingStage):
    """Latents and text embeddings of a user's captioned images; what cannot be used is rejected with the reason."""

    name, doing = "image_latents", "encoding images"

    images: ImageSet
    folder: ShardFolder
    model: Model
    title: str = "sft latents"
    requested: tuple[int, ...] | None = None
    """None for all shards that the images fill."""

    @property
    def indices(self) -> list[int]:
        return list(self.images.shards) if self.requested is None else list(self.requested)

    def units(self, indices: Iterable[int], sources: Sequence[Mapping[int, ShardManifest]]) -> dict[int, int]:
        return {index: len(self.images.shard(index)) for index in indices}

    def recipe(self, *, copy_to_store: bool = False) -> dict[str, Any]:
        return {"images": locate_images(self.folder.store, self.images, copy_to_store=copy_to_store),
                "images_id": self.images.id, **super().recipe(copy_to_store=copy_to_store)}

    @classmethod
    def open(cls, folder: ShardFolder, recipe: Mapping[str, Any], indices: Sequence[int]) -> Self:
        store = folder.store
        return cls(open_located_images(store, recipe["images"], recipe["images_id"]), folder,
                   find_located_model(store, folder.config, recipe), requested=tuple(indices))

    @contextmanager
    def load(self, worker: Worker) -> Iterator[Computer]:
        backbone = self.backbone(worker.device)
        with self.images.reader() as reader:
            yield _Encoding(self, backbone, reader, ENCODE_BATCH)

    @property
    def read_concept(self) -> ReadConcept | None:
        """How a concept is read from each image; None for a stage without."""
        return None

    @property
    def images_per_shard(self) -> int:
        return max((len(self.images.shard(index)) for index in list(self.images.shards)[:1]), default=1)

    @property
    def images_per_unit(self) -> int:
        return 2 if self.flips else 1

    def refuse_if_empty(self) -> None:
        """InputError when all shards exist and hold no image."""
        made = self.existing()
        if len(made) == len(self.indices) and not any(manifest.rows for manifest in made.values()):
            raise InputError(f"none of the {len(self.images)} images can be used; the reasons are in "
                             f"{self.folder.store.url(self.folder.key)}/rejected")


class _Usable(NamedTuple):
    """A batch of images, and the file_name and reason of those that were met on the way and cannot be used."""

    images: list[Captioned]
    rejected: list[dict[str, str]]


@dataclass
class _Encoding(Computer):
    """A codec and a text encoder that read the user's images."""

    stage: ImageLatentStage
    backbone: Backbone
    reader: Any
    batch_size: int | None

    def batches(self, index: int, tables: Sequence[pa.Table]) -> Iterator[_Usable]:
        stage, rows = self.stage, self.stage.images.shard(index)
        assert self.batch_size is not None
        read = partial(_open, stage.images.kind, stage.size, stage.read_concept)
        return _usable(rows, self.reader.read(rows), read, self.batch_size)

    def compute(self, index: int, tables: Sequence[pa.Table], batches: Iterator[Any], worker: Worker,
                advance: Advance) -> ShardRows:
        stage, rejected = self.stage, list[dict[str, str]]()
        table, cut = _encode(self.backbone, batches, stage.flips, stage.read_concept is not None, rejected)
        advance(len(stage.images.shard(index)))
        return ShardRows(table, pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA),
                         {**self.backbone.shapes(stage.size), "rejected": len(rejected), "cut_captions": cut})


def _usable(rows: pa.Table, contents: Iterator[bytes | str], read: Callable[[Any], Captioned | str],
            batch_size: int) -> Iterator[_Usable]:
    """The usable images in batches of `batch_size`, and with them the others; the last batch may be empty."""
    batch, rejected = list[Captioned](), list[dict[str, str]]()
    names = rows["name"].to_pylist()
    files = zip(names, rows["caption"].to_pylist(), rows["problem"].to_pylist(), contents, strict=True)
    for name, image in zip(names, thread_map(read, files), strict=True):
        if isinstance(image, str):
            rejected.append({"file_name": name, "reason": image})
            continue
        batch.append(image)
        if len(batch) == batch_size:
            yield _Usable(batch, rejected)
            batch, rejected = [], []
    yield _Usable(batch, rejected)


def _open(kind: Kind, size: tuple[int, int], read_concept: ReadConcept | None,
          file: tuple[str, str | None, str | None, bytes | str]) -> Captioned | str:
    """The image as training reads it, or why it cannot be used; of name, caption, its problem and the content."""
    name, caption, problem, data = file
    if not (caption or "").strip():
        return f"its caption cannot be read: {problem}" if problem else f"it has no caption: {CAPTIONING[kind]}"
    if isinstance(data, str):
        return data
    try:
        image = decode_image(data)
        concept = read_concept(image, caption or "") if read_concept is not None else b""
    except InputError as error:
        return str(error)
    if min(image.width / size[0], image.height / size[1]) < SMALLEST_SCALE:
        return f"it has {image.width}x{image.height} pixels, under half of {size[0]}x{size[1]}"
    return name, caption or "", to_model_range(fit_image(image, *size)), sizes_of(image.size, size), concept


def sizes_of(original: tuple[int, int], size: tuple[int, int]) -> tuple[int, ...]:
    """The six numbers of SIZES for an image of (width, height) pixels that `fit_image` brings to a size."""
    scale = max(size[0] / original[0], size[1] / original[1])
    left, top = ((round(side * scale) - cut) // 2 for side, cut in zip(original, size, strict=True))
    return original[1], original[0], top, left, size[1], size[0]


def _encode(backbone: Backbone, batches: Iterator[_Usable], flips: bool, concepts: bool,
            rejected: list[dict[str, str]]) -> tuple[pa.Table, int]:
    """A shard's table, and how many captions were longer than the text encoder reads; fills `rejected`."""
    schema, cut = with_pooled(SCHEMA.append(MIRRORED) if flips else SCHEMA, backbone), 0
    schema = schema.append(CONCEPT) if concepts else schema
    schema = schema.append(SIZES_COLUMN) if backbone.denoiser.reads_sizes else schema
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for batch in batches:
        rejected += batch.rejected
        if not batch.images:
            continue
        names, captions, images, sizes, cut_out = map(list, zip(*batch.images, strict=True))
        pixels = torch.from_numpy(np.stack(images))
        columns["file_name"] += names
        columns["caption"] += captions
        columns["latents"] += row_bytes(backbone.codec.encode(pixels))
        if flips:
            columns["mirrored"] += row_bytes(backbone.codec.encode(pixels.flip(-1)))
        if concepts:
            columns["concept"] += cut_out
        if backbone.denoiser.reads_sizes:
            columns[SIZES_COLUMN.name] += row_bytes(torch.tensor(sizes))
        for name, cells in text_columns(backbone.text.encode_captions(captions)).items():
            columns[name] += cells
        cut += backbone.text.count_cut(captions)
    return pa.table(columns, schema=schema), cut


@dataclass(frozen=True)
class SkippedImages:
    """The part of an image set that is not trained on, or not whole."""

    images: int
    rejected: int
    cut_captions: int
    reasons: list[dict[str, str]]
    """file_name and reason of the first ones."""
    kinds: dict[str, int]
    """How often each reason was given, most frequent first; numbers in it are left out."""

    def describe(self) -> str:
        """One line, empty when all is used."""
        parts = []
        if self.rejected:
            kinds = "; ".join(f"{kind}: {count}" for kind, count in list(self.kinds.items())[:4])
            parts.append(f"skipped, not trained on: {self.rejected} of {self.images} images ({kinds})")
        if self.cut_captions:
            parts.append(f"captions cut at the length that the text encoder reads: {self.cut_captions}")
        return "; ".join(parts)


def find_skipped(latents: ShardFolder, images: int, *, show: int = 200) -> SkippedImages:
    """What was skipped when `latents` were made of so many images; of it the first `show` by name."""
    manifests = latents.manifests()
    kinds: Counter[str] = Counter()
    reasons: list[dict[str, str]] = []
    for index, manifest in manifests.items():
        if manifest.details["rejected"]:
            rows = read_table(latents.store, f"{latents.key}/rejected/shard-{index:05d}.parquet").to_pylist()
            kinds.update(_kind(row["reason"]) for row in rows)
            reasons += rows[:show - len(reasons)]
    cut = sum(manifest.details.get("cut_captions", 0) for manifest in manifests.values())
    return SkippedImages(images, kinds.total(), cut, reasons, dict(kinds.most_common()))


def _kind(reason: str) -> str:
    if "do not decode as an image" in reason:
        return "no image that can be decoded"
    if "under half of" in reason:
        return "under half of the requested size"
    return reason.partition(":")[0].partition(", only the path ")[0]
