"""How far the latents of a pool's n-th best image are from its best one, in their channel statistics (Figure 5b)."""

import time
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoencoderKL

from hgdpo_core.config import content_hash
from hgdpo_core.errors import StoppedError
from hgdpo_core.images import decode_image, to_model_range
from hgdpo_core.metrics import latent_distance
from hgdpo_core.models import Model, default_device, device_name, load_pipeline
from hgdpo_core.models.sampling import encode_latents
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.stages.pool import PoolPlan
from hgdpo_core.stages.triplets import RankedPool, read_ranked_pools
from hgdpo_core.storage.shards import InputShard, ShardFolder

MEASURED_POOLS = 32  # for the curve of the report; more only make it smoother
ENCODE_BATCH = 16
SCHEMA = pa.schema([("prompt_id", pa.string()), ("rank", pa.int32()), ("mean_distance", pa.float32()),
                    ("deviation_distance", pa.float32())])


def distance_folder(pool: ShardFolder, scores: ShardFolder, model: Model) -> ShardFolder:
    """Where the distances within a pool, ranked by its scores, in the latents of a model's VAE lie."""
    settings = {"stage": "distances", "pool": pool.key, "scores": scores.key, "model": model.identity()}
    pool_id = pool.key.rpartition("/")[2]
    return ShardFolder.create(pool.store, f"latent_distances/{pool_id}/{content_hash(settings)}", settings)


def enough_shards(pool: PoolPlan, pools: int = MEASURED_POOLS) -> list[int]:
    """The first shards that hold `pools` pools together, or all."""
    return first_shards({shard.index: len(shard.prompts) for shard in pool.shards}, pools)


def first_shards(prompts: Mapping[int, int], pools: int = MEASURED_POOLS) -> list[int]:
    """The same for shards by index, each with its number of prompts."""
    chosen, held = [], 0
    for index, count in prompts.items():
        if held >= pools:
            break
        chosen.append(index)
        held += count
    return chosen


def missing_distances(pool: ShardFolder, scores: ShardFolder, distances: ShardFolder,
                      indices: Sequence[int]) -> list[int]:
    """The shards of `indices` that are not there, or were made of other images or scores than today's."""
    return [index for index in indices if distances.find(index, _inputs(pool, scores, index)) is None]


def _inputs(pool: ShardFolder, scores: ShardFolder, index: int) -> tuple[InputShard, InputShard]:
    return pool.input_shard(index), scores.input_shard(index)


def measure_distances(pool: ShardFolder, scores: ShardFolder, distances: ShardFolder, model: Model,
                      missing: Sequence[int], *, device: str | None = None, progress: Progress = silent,
                      should_stop: ShouldStop = never_stop) -> int:
    """Measure the `missing` shards; returns the number of pools. Those with a score that is not finite are left out."""
    if not missing:
        return 0
    device = device or default_device()
    vae = load_pipeline(model, device, vae_dtype="float32").vae
    measured = 0
    for done, index in enumerate(missing, start=1):
        start, rows = time.monotonic(), []
        for ranked in read_ranked_pools(pool, scores, index):
            if should_stop():
                raise StoppedError("stopped while measuring latent distances; finished shards are kept")
            if np.isfinite(ranked.scores).all():
                rows += _rows(vae, ranked)
                measured += 1
        distances.commit(index, pa.Table.from_pylist(rows, schema=SCHEMA), inputs=_inputs(pool, scores, index),
                         device=device_name(device), batch_size=ENCODE_BATCH, seconds=time.monotonic() - start)
        progress(done, len(missing), "shards")
    return measured


def _rows(vae: AutoencoderKL, pool: RankedPool) -> list[dict]:
    order = np.argsort(-np.array(pool.scores), kind="stable")
    latents = _encode(vae, [pool.images[i] for i in order])
    means, deviations = latent_distance(latents[:1].expand(len(order) - 1, -1, -1, -1), latents[1:])
    return [{"prompt_id": pool.prompt_id, "rank": rank, "mean_distance": mean, "deviation_distance": deviation}
            for rank, (mean, deviation) in enumerate(zip(means.tolist(), deviations.tolist(), strict=True), start=2)]


def _encode(vae: AutoencoderKL, images: Sequence[bytes]) -> torch.Tensor:
    """Scaled latents float32 [B, C, h, w] of encoded images."""
    pixels = [to_model_range(decode_image(data)) for data in images]
    return torch.cat([encode_latents(vae, torch.from_numpy(np.stack(pixels[start:start + ENCODE_BATCH])))
                      for start in range(0, len(pixels), ENCODE_BATCH)])


def read_distances(distances: ShardFolder, indices: Sequence[int], images_per_prompt: int) -> np.ndarray:
    """Distances of channel means and of channel standard deviations, float64 [pools, N - 1, 2].

    Row n - 2 of a pool is its n-th best image against its best.
    """
    rows = pa.concat_tables([distances.read(index) for index in indices])
    columns = [rows[name].to_numpy() for name in ("mean_distance", "deviation_distance")]
    return np.stack(columns, axis=-1).reshape(-1, images_per_prompt - 1, 2).astype(np.float64)
