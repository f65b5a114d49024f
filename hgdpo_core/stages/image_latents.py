"""The user's own images for SFT: checked, encoded once, kept in shards; the unusable set aside with its reason."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import torch

from hgdpo_core.config import content_hash
from hgdpo_core.devices import default_device
from hgdpo_core.errors import InputError
from hgdpo_core.image_sets import offer_images, open_offered_images
from hgdpo_core.image_sets.sets import CAPTIONING, ImageSet, Kind
from hgdpo_core.images import decode_image, fit_image, to_model_range
from hgdpo_core.models import Backbone, Model, load_backbone
from hgdpo_core.models.places import find_offered_model, model_means
from hgdpo_core.models.sizes import ModelSize
from hgdpo_core.parallel import threads
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.stages.base import Computer, Probe, ShardRows, Stage, Worker
from hgdpo_core.stages.probes import ENCODE_BATCH, probe_encoding
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder, ShardManifest, read_table

SMALLEST_SCALE = 0.5
PIXELS_VERSION = 2
"""In the settings of sets with profiles or transparency, whose pixels were others before: sRGB, on white."""
SCHEMA = pa.schema([("file_name", pa.string()), ("caption", pa.string()), ("latents", pa.binary()),
                    ("prompt_embeds", pa.binary())])
MIRRORED = pa.field("mirrored", pa.binary())  # of a folder with flips
REJECTED_SCHEMA = pa.schema([("file_name", pa.string()), ("reason", pa.string())])


def image_latent_folder(store: Store, images: ImageSet, model: Model, size: tuple[int, int], *,
                        flips: bool = False) -> ShardFolder:
    """Where the latents of an image set by a model's VAE and text encoder lie; size is (width, height) in pixels.

    With `flips` it holds those of the mirrored images too.
    """
    settings = {"stage": "image_latents", "images_id": images.id, "fingerprint": model.fingerprint,
                "dtype": model.dtype, "clip_skip": model.clip_skip, "width": size[0], "height": size[1]}
    if flips:
        settings["flips"] = True
    if images.converted:
        settings["pixels"] = PIXELS_VERSION
    settings |= model.encoding()
    return ShardFolder.create(store, f"latents/images-{images.id}/{content_hash(settings)}", settings)


@dataclass(frozen=True)
class ImageLatentStage(Stage):
    """Latents and text embeddings of a user's captioned images; what cannot be used is rejected with the reason."""

    name: ClassVar[str] = "image_latents"
    doing: ClassVar[str] = "encoding images"

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
        store = self.folder.store
        return {"images": offer_images(store, self.images, share=copy_to_store), "images_id": self.images.id,
                **model_means(store, self.model, share=copy_to_store)}

    @classmethod
    def open(cls, folder: ShardFolder, recipe: Mapping[str, Any], indices: Sequence[int]) -> Self:
        store = folder.store
        return cls(open_offered_images(store, recipe["images"], recipe["images_id"]), folder,
                   find_offered_model(store, folder.config, recipe), requested=tuple(indices))

    @contextmanager
    def load(self, worker: Worker) -> Iterator[Computer]:
        backbone = load_backbone(self.model, worker.device, codec_dtype="float32")
        with self.images.reader() as reader:
            yield _Encoding(self, backbone, reader)

    @property
    def images_per_shard(self) -> int:
        return max((len(self.images.shard(index)) for index in list(self.images.shards)[:1]), default=1)

    @property
    def work(self) -> str:
        return "encode"

    @property
    def images_per_unit(self) -> int:
        return 2 if self.folder.config.get("flips") else 1

    def probe(self) -> Probe | None:
        return probe_encoding(self.model, self.size)

    def unit_bytes(self, size: ModelSize, image_bytes: float) -> float:
        return size.latent_bytes(self.size, self.images_per_unit)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.folder.config["width"], self.folder.config["height"]

    def refuse_if_empty(self) -> None:
        """InputError when all shards are there and hold no image."""
        made = self.existing()
        if len(made) == len(self.indices) and not any(manifest.rows for manifest in made.values()):
            raise InputError(f"none of the {len(self.images)} images can be used; the reasons are in "
                             f"{self.folder.store.url(self.folder.key)}/rejected")


class _Encoding:
    """A codec and a text encoder that read the user's images; memory holds one batch of them."""

    def __init__(self, stage: ImageLatentStage, backbone: Backbone, reader: Any):
        self._stage, self._backbone, self._reader = stage, backbone, reader
        self._shapes = backbone.shapes(stage.size)
        self.batch_size: int | None = ENCODE_BATCH

    def compute(self, index: int, tables: Sequence[pa.Table], worker: Worker,
                advance: Callable[[int], None]) -> ShardRows:
        stage, rows = self._stage, self._stage.images.shard(index)
        assert self.batch_size is not None
        rejected: list[dict[str, str]] = []
        usable = _usable(stage.images.kind, rows, self._reader.read(rows), stage.size, rejected, self.batch_size)
        table, cut = _encode(self._backbone, _until_stopped(usable, worker), stage.folder.config.get("flips", False))
        advance(len(rows))
        return ShardRows(table, pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA),
                         {**self._shapes, "rejected": len(rejected), "cut_captions": cut})


def _until_stopped(batches: Iterator[list["_Picture"]], worker: Worker) -> Iterator[list["_Picture"]]:
    for batch in batches:
        worker.check_stop(ImageLatentStage.doing)
        yield batch


def cache_image_latents(images: ImageSet, latents: ShardFolder, model: Model, *, device: str | None = None,
                        progress: Progress = silent, should_stop: ShouldStop = never_stop) -> int:
    """Encode the missing shards here; returns how many images were read. InputError when none can be used."""
    stage = ImageLatentStage(images, latents, model)
    read = stage.make(Worker(device or default_device(), progress, should_stop))
    stage.refuse_if_empty()
    return read


@dataclass(frozen=True)
class _Picture:
    name: str
    caption: str
    pixels: np.ndarray
    """float32 [3, H, W] in [-1, 1]."""


def _usable(kind: Kind, rows: pa.Table, contents: Iterator[bytes | str], size: tuple[int, int],
            rejected: list[dict[str, str]], batch_size: int) -> Iterator[list[_Picture]]:
    """The usable images in batches of `batch_size`; the others go to `rejected`."""
    batch: list[_Picture] = []
    names, captions, problems = (rows[column].to_pylist() for column in ("name", "caption", "problem"))
    for start in range(0, len(names), batch_size):
        part = slice(start, start + batch_size)
        data = [next(contents) for _ in names[part]]
        opened = threads().map(partial(_open, kind, size), names[part], captions[part], problems[part], data)
        for name, picture in zip(names[part], opened, strict=True):
            if isinstance(picture, str):
                rejected.append({"file_name": name, "reason": picture})
            else:
                batch.append(picture)
        if len(batch) >= batch_size:
            yield batch[:batch_size]
            batch = batch[batch_size:]
    if batch:
        yield batch


def _open(kind: Kind, size: tuple[int, int], name: str, caption: str | None, problem: str | None,
          data: bytes | str) -> _Picture | str:
    """The picture as training wants it, or why it is of no use."""
    if not (caption or "").strip():
        return f"its caption cannot be read: {problem}" if problem else f"it has no caption: {CAPTIONING[kind]}"
    if isinstance(data, str):
        return data
    try:
        picture = decode_image(data)
    except InputError as error:
        return str(error)
    if min(picture.width / size[0], picture.height / size[1]) < SMALLEST_SCALE:
        return f"it has {picture.width}x{picture.height} pixels, under half of {size[0]}x{size[1]}"
    return _Picture(name, caption or "", to_model_range(fit_image(picture, *size)))


def _encode(backbone: Backbone, batches: Iterator[list[_Picture]], flips: bool) -> tuple[pa.Table, int]:
    """A shard's table, and how many captions were longer than the text encoder reads."""
    schema = SCHEMA.append(MIRRORED) if flips else SCHEMA
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    cut = 0
    for batch in batches:
        captions = [picture.caption for picture in batch]
        pixels = torch.from_numpy(np.stack([picture.pixels for picture in batch]))
        columns["file_name"] += [picture.name for picture in batch]
        columns["caption"] += captions
        columns["latents"] += [row.numpy().tobytes() for row in backbone.codec.encode(pixels)]
        if flips:
            columns["mirrored"] += [row.numpy().tobytes() for row in backbone.codec.encode(pixels.flip(-1))]
        texts = backbone.text.encode_captions(captions).embeds
        columns["prompt_embeds"] += [row.numpy().tobytes() for row in texts.float().cpu()]
        cut += backbone.text.count_cut(captions)
    return pa.table(columns, schema=schema), cut


@dataclass(frozen=True)
class SetAside:
    """What of an image set is not trained on, or not whole."""

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
            parts.append(f"set aside, not trained on: {self.rejected} of {self.images} images ({kinds})")
        if self.cut_captions:
            parts.append(f"captions cut at the length that the text encoder reads: {self.cut_captions}")
        return "; ".join(parts)


def find_set_aside(latents: ShardFolder, images: int, *, show: int = 200) -> SetAside:
    """What was set aside when `latents` were made of so many images; of it the first `show` by name."""
    manifests = latents.manifests()
    kinds: Counter[str] = Counter()
    reasons: list[dict[str, str]] = []
    for index, manifest in manifests.items():
        if manifest.details["rejected"]:
            rows = read_table(latents.store, f"{latents.key}/rejected/shard-{index:05d}.parquet").to_pylist()
            kinds.update(_kind(row["reason"]) for row in rows)
            reasons += rows[:show - len(reasons)]
    return SetAside(images, kinds.total(), sum(m.details.get("cut_captions", 0) for m in manifests.values()), reasons,
                    dict(kinds.most_common()))


def _kind(reason: str) -> str:
    if "do not decode as an image" in reason:
        return "no image that can be decoded"
    if "under half of" in reason:
        return "under half of the wanted size"
    return reason.partition(":")[0].partition(", only the path ")[0]
