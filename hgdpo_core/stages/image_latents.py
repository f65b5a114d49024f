"""The user's own images for SFT: checked, encoded once, kept in shards; the unusable set aside with its reason."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from hgdpo_core.config import content_hash
from hgdpo_core.errors import InputError, StoppedError
from hgdpo_core.image_sets.sets import CAPTIONING, ImageSet, Kind
from hgdpo_core.images import decode_image, fit_image, to_model_range
from hgdpo_core.models import Model, default_device, device_name, load_pipeline
from hgdpo_core.models.sampling import encode_latents, encode_text
from hgdpo_core.parallel import threads
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.stages.latents import ENCODE_BATCH, embedding_shapes
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder, read_table

SMALLEST_SCALE = 0.5
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
    return ShardFolder.create(store, f"latents/images-{images.id}/{content_hash(settings)}", settings)


def cache_image_latents(images: ImageSet, latents: ShardFolder, model: Model, *, device: str | None = None,
                        progress: Progress = silent, should_stop: ShouldStop = never_stop) -> int:
    """Encode the missing shards; returns how many images were read. What cannot be used is listed in `rejected/`.

    Memory holds one batch of pictures and one shard of latents. InputError when no image at all can be used.
    """
    found = latents.manifests()
    missing = [index for index in images.shards if index not in found]
    total, done = sum(len(images.shard(index)) for index in missing), 0
    device = device or default_device()
    if missing:
        pipeline = load_pipeline(model, device, vae_dtype="float32")
        size = (latents.config["width"], latents.config["height"])
        shapes = embedding_shapes(pipeline, size)
    with images.reader() as reader:
        for index in missing:
            if should_stop():
                raise StoppedError("stopped while encoding images; finished shards are kept")
            start, rows = time.monotonic(), images.shard(index)
            rejected: list[dict[str, str]] = []
            usable = _usable(images.kind, rows, reader.read(rows), size, rejected)
            table, cut = _encode(pipeline, model, usable, latents.config.get("flips", False))
            if rejected:
                latents.reject(f"shard-{index:05d}", pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA))
            latents.commit(index, table, device=device_name(device), batch_size=ENCODE_BATCH,
                           seconds=time.monotonic() - start,
                           details={**shapes, "rejected": len(rejected), "cut_captions": cut})
            done += len(rows)
            progress(done, total, "images")
    if not sum(manifest.rows for manifest in latents.manifests().values()):
        raise InputError(f"none of the {len(images)} images can be used; the reasons are in "
                         f"{latents.store.url(latents.key)}/rejected")
    return done


@dataclass(frozen=True)
class _Picture:
    name: str
    caption: str
    pixels: np.ndarray
    """float32 [3, H, W] in [-1, 1]."""


def _usable(kind: Kind, rows: pa.Table, contents: Iterator[bytes | str], size: tuple[int, int],
            rejected: list[dict[str, str]]) -> Iterator[list[_Picture]]:
    """The usable pictures in batches of ENCODE_BATCH; the others go to `rejected`."""
    batch: list[_Picture] = []
    names, captions = rows["name"].to_pylist(), rows["caption"].to_pylist()
    for start in range(0, len(names), ENCODE_BATCH):
        part = slice(start, start + ENCODE_BATCH)
        data = [next(contents) for _ in names[part]]
        opened = threads().map(partial(_open, kind, size), names[part], captions[part], data)
        for name, picture in zip(names[part], opened, strict=True):
            if isinstance(picture, str):
                rejected.append({"file_name": name, "reason": picture})
            else:
                batch.append(picture)
        if len(batch) >= ENCODE_BATCH:
            yield batch[:ENCODE_BATCH]
            batch = batch[ENCODE_BATCH:]
    if batch:
        yield batch


def _open(kind: Kind, size: tuple[int, int], name: str, caption: str | None, data: bytes | str) -> _Picture | str:
    """The picture as training wants it, or why it is of no use."""
    if not (caption or "").strip():
        return f"it has no caption: {CAPTIONING[kind]}"
    if isinstance(data, str):
        return data
    try:
        picture = decode_image(data)
    except InputError as error:
        return str(error)
    if min(picture.width / size[0], picture.height / size[1]) < SMALLEST_SCALE:
        return f"it has {picture.width}x{picture.height} pixels, under half of {size[0]}x{size[1]}"
    return _Picture(name, caption or "", to_model_range(fit_image(picture, *size)))


def _encode(pipeline: Any, model: Model, batches: Iterator[list[_Picture]], flips: bool) -> tuple[pa.Table, int]:
    """A shard's table, and how many captions were longer than the text encoder reads."""
    schema = SCHEMA.append(MIRRORED) if flips else SCHEMA
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    cut = 0
    for batch in batches:
        captions = [picture.caption for picture in batch]
        pixels = torch.from_numpy(np.stack([picture.pixels for picture in batch]))
        columns["file_name"] += [picture.name for picture in batch]
        columns["caption"] += captions
        columns["latents"] += [row.numpy().tobytes() for row in encode_latents(pipeline.vae, pixels)]
        if flips:
            columns["mirrored"] += [row.numpy().tobytes() for row in encode_latents(pipeline.vae, pixels.flip(-1))]
        texts = encode_text(pipeline, captions, model.clip_skip)
        columns["prompt_embeds"] += [row.numpy().tobytes() for row in texts.float().cpu()]
        cut += sum(len(ids) > pipeline.tokenizer.model_max_length for ids in pipeline.tokenizer(captions).input_ids)
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
