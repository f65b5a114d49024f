"""What training reads instead of images: latents and text embeddings, made once and kept in shards.

Latents are scaling_factor * posterior mean, float32; where flips are wanted, of the mirrored image too, since the
mirrored latent of an image is not the latent of its mirror image. Conditioning is exactly the embedding that the
sampler used: from the same text encoder in the same precision, of the same length. Long prompts have longer embeddings
than others, so a row's length says how many chunks it holds, and a batch of several lengths is padded and masked.
"""

import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from diffusers import StableDiffusionPipeline

from hgdpo_core.config import content_hash
from hgdpo_core.errors import InputError, StoppedError
from hgdpo_core.images import decode_image, to_model_range
from hgdpo_core.models import Model, default_device, device_name, load_pipeline
from hgdpo_core.models.sampling import encode_latents
from hgdpo_core.models.text_encoder import TextEncoder
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder

ENCODE_BATCH = 16
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
    dataset = triplets.key.split("/")[-1]
    return ShardFolder.create(store, f"latents/{dataset}/{content_hash(settings)}", settings)


def missing_latents(triplets: ShardFolder, latents: ShardFolder, indices: Sequence[int]) -> list[int]:
    """The triplet shards of `indices` whose latents are not there, or are of other bytes than the triplets' today."""
    manifests, found = triplets.manifests(indices), latents.manifests(indices)
    return [i for i in indices
            if i not in found or found[i].inputs != (triplets.input_shard(i, manifest=manifests.get(i)),)]


def cache_latents(triplets: ShardFolder, latents: ShardFolder, model: Model, indices: Sequence[int], *,
                  device: str | None = None, progress: Progress = silent,
                  should_stop: ShouldStop = never_stop) -> int:
    """Encode the missing shards among `indices`; returns the number of pairs encoded."""
    missing = missing_latents(triplets, latents, indices)
    if not missing:
        return 0
    manifests = triplets.manifests(missing)
    device = device or default_device()
    pipeline = load_pipeline(model, device, vae_dtype="float32")
    text_encoder = TextEncoder(pipeline, model)
    size = (latents.config["width"], latents.config["height"])
    total, done = sum(manifests[i].rows for i in missing), 0
    for index in missing:
        if should_stop():
            raise StoppedError("stopped while encoding latents; finished shards are kept")
        start = time.monotonic()
        table = _encode_shard(pipeline, text_encoder, triplets.read(index), size, latents.config.get("flips", False))
        source = triplets.input_shard(index, manifest=manifests[index])
        latents.commit(index, table, inputs=(source,), device=device_name(device), batch_size=ENCODE_BATCH,
                       seconds=time.monotonic() - start, details=embedding_shapes(pipeline, size))
        done += table.num_rows
        progress(done, total, "pairs")
    return done


def _encode_shard(pipeline: StableDiffusionPipeline, text_encoder: TextEncoder, rows: pa.Table,
                  size: tuple[int, int], flips: bool) -> pa.Table:
    embeds = text_encoder.encode(rows["caption"].to_pylist())
    table = pa.table({
        "prompt_id": rows["prompt_id"],
        "winner": _encode_images(pipeline, rows["jpg_0"].to_pylist(), size),
        "loser": _encode_images(pipeline, rows["jpg_1"].to_pylist(), size),
        "prompt_embeds": [row.float().cpu().numpy().tobytes() for row in embeds],
    }, schema=SCHEMA)
    for name, images in zip(MIRRORED, ("jpg_0", "jpg_1"), strict=True) if flips else ():
        mirrored = _encode_images(pipeline, rows[images].to_pylist(), size, mirror=True)
        table = table.append_column(pa.field(name, pa.binary()), [mirrored])
    return table


def _encode_images(pipeline: StableDiffusionPipeline, images: list[bytes], size: tuple[int, int], *,
                   mirror: bool = False) -> list[bytes]:
    encoded: list[bytes] = []
    for start in range(0, len(images), ENCODE_BATCH):
        pictures = [decode_image(data) for data in images[start:start + ENCODE_BATCH]]
        wrong = next((picture.size for picture in pictures if picture.size != size), None)
        if wrong:
            raise InputError(f"a triplet's image is {wrong[0]}x{wrong[1]} pixels, expected {size[0]}x{size[1]}")
        pixels = torch.from_numpy(np.stack([to_model_range(picture) for picture in pictures]))
        if mirror:
            pixels = pixels.flip(-1)
        encoded += [row.numpy().tobytes() for row in encode_latents(pipeline.vae, pixels)]
    return encoded


def embedding_shapes(pipeline: StableDiffusionPipeline, size: tuple[int, int]) -> dict[str, list[int]]:
    """Shapes of one image's latents and of one chunk of a prompt's embedding, as a manifest records them."""
    factor = pipeline.vae_scale_factor
    text = pipeline.text_encoder.config
    return {"latent_shape": [pipeline.vae.config.latent_channels, size[1] // factor, size[0] // factor],
            "embeds_shape": [pipeline.tokenizer.model_max_length, text.hidden_size]}
