"""Figure 5b: how far the latents of a pool's n-th best image are from its best one, in their channel statistics."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from hgdpo_core.ablate.program import Shared, StageProgress, silent_stages
from hgdpo_core.ablate.settings import World
from hgdpo_core.config import content_hash
from hgdpo_core.errors import StoppedError
from hgdpo_core.images import decode_image, to_model_range
from hgdpo_core.metrics import latent_distance
from hgdpo_core.models import default_device, load_pipeline
from hgdpo_core.progress import ShouldStop, never_stop
from hgdpo_core.sampler import encode_latents
from hgdpo_core.shards import ShardFolder
from hgdpo_core.triplets import RankedPool, read_ranked_pools

ENCODE_BATCH = 16
SCHEMA = pa.schema([("prompt_id", pa.string()), ("rank", pa.int32()), ("mean_distance", pa.float32()),
                    ("deviation_distance", pa.float32())])


def measure_distances(shared: Shared, world: World, stages: StageProgress = silent_stages,
                      should_stop: ShouldStop = never_stop) -> np.ndarray:
    """Cosine distances of channel means and standard deviations to the best image, float64 [pools, N - 1, 2].

    Row n - 2 of a pool is its n-th best image by the world's judge. Whole shards of the pool are measured, at least
    `distance_pools` pools where there are as many; pools with a score that is not finite are left out.
    """
    pool, scores, settings = shared.pool, shared.scores[world], shared.ablation.settings
    folder = ShardFolder.create(
        pool.folder.store, f"latent_distances/{pool.pool_id}/{content_hash([scores.key, shared.model.fingerprint])}",
        {"stage": "latent_distances", "scores": scores.key, "fingerprint": shared.model.fingerprint})
    indices = _enough_shards(shared, settings.distance_pools)
    inputs = {i: (pool.folder.input_shard(i), scores.input_shard(i)) for i in indices}
    missing = [i for i in indices if folder.find(i, inputs[i]) is None]
    if missing:
        pipeline = load_pipeline(shared.model, default_device(), vae_dtype="float32")
        with stages("distances") as progress:
            for done, index in enumerate(missing, start=1):
                if should_stop():
                    raise StoppedError("stopped while measuring latent distances; finished shards are kept")
                rows = [row for ranked in read_ranked_pools(pool.folder, scores, index)
                        if np.isfinite(ranked.scores).all() for row in _rows(pipeline.vae, ranked)]
                folder.commit(index, pa.Table.from_pylist(rows, schema=SCHEMA), inputs=inputs[index])
                progress(done, len(missing), "shards")
    return _read(folder, indices, pool.pool.images_per_prompt)


def _enough_shards(shared: Shared, pools: int) -> list[int]:
    """The first shards that hold `pools` pools together, or all."""
    chosen, held = [], 0
    for shard in shared.pool.shards:
        if held >= pools:
            break
        chosen.append(shard.index)
        held += len(shard.prompts)
    return chosen


def _rows(vae, pool: RankedPool) -> list[dict]:
    order = np.argsort(-np.array(pool.scores), kind="stable")
    latents = encode_images(vae, [pool.images[i] for i in order])
    means, deviations = latent_distance(latents[:1].expand(len(order) - 1, -1, -1, -1), latents[1:])
    return [{"prompt_id": pool.prompt_id, "rank": rank, "mean_distance": mean, "deviation_distance": deviation}
            for rank, (mean, deviation) in enumerate(zip(means.tolist(), deviations.tolist(), strict=True), start=2)]


def encode_images(vae, images: Sequence[bytes]) -> torch.Tensor:
    """Scaled latents float32 [B, C, h, w] of encoded images."""
    pixels = [to_model_range(decode_image(data)) for data in images]
    return torch.cat([encode_latents(vae, torch.from_numpy(np.stack(pixels[start:start + ENCODE_BATCH])))
                      for start in range(0, len(pixels), ENCODE_BATCH)])


def _read(folder: ShardFolder, indices: Sequence[int], images: int) -> np.ndarray:
    rows = pa.concat_tables([folder.read(index) for index in indices])
    columns = [rows[name].to_numpy() for name in ("mean_distance", "deviation_distance")]
    return np.stack(columns, axis=-1).reshape(-1, images - 1, 2).astype(np.float64)
