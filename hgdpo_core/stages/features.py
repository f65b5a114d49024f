"""Image features of a pool by a judge's own image tower: how much the images of one prompt differ (paper Figure 8)."""

import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from hgdpo_core.config import ScorerConfig, content_hash
from hgdpo_core.errors import StoppedError
from hgdpo_core.images import decode_image
from hgdpo_core.metrics import mean_pairwise_distance
from hgdpo_core.models import DTYPES, default_device, device_name
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.prompts import prompt_id
from hgdpo_core.scorers import find_scorer, load_embedder
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder

SCHEMA = pa.schema([("prompt_id", pa.string()), ("index", pa.int32()), ("feature", pa.binary())])


def feature_folder(store: Store, pool_id: str, scorer: ScorerConfig) -> ShardFolder:
    """Where the features of a pool by a scorer's image tower lie: float32 vectors as bytes."""
    settings = {"stage": "features", "pool_id": pool_id, "scorer": scorer.name, "dtype": scorer.dtype,
                "fingerprint": find_scorer(scorer.name, scorer.source)}
    return ShardFolder.create(store, f"features/{pool_id}/{scorer.name}-{content_hash(settings)}", settings)


def embed_pool(pool: ShardFolder, features: ShardFolder, scorer: ScorerConfig, missing: Sequence[int], *,
               device: str | None = None, progress: Progress = silent, should_stop: ShouldStop = never_stop) -> int:
    """Embed the `missing` shards, one shard of features a shard of images; returns the images embedded."""
    if not missing:
        return 0
    device = device or default_device()
    embedder = load_embedder(scorer.name, source=scorer.source, device=device, dtype=DTYPES[scorer.dtype])
    total, done = sum(manifest.rows for manifest in pool.manifests(missing).values()), 0
    for index in missing:
        start, images, vectors = time.monotonic(), pool.read(index), []
        for first in range(0, images.num_rows, scorer.batch_size):
            if should_stop():
                raise StoppedError("stopped while embedding images; finished shards are kept")
            part = [decode_image(data) for data in images["image"].slice(first, scorer.batch_size).to_pylist()]
            vectors += [vector.numpy().tobytes() for vector in embedder.embed_images(part).float().cpu()]
            progress(done + len(vectors), total, "images")
        done += len(vectors)
        table = pa.table({"prompt_id": images["prompt_id"], "index": images["index"], "feature": vectors},
                         schema=SCHEMA)
        features.commit(index, table, inputs=(pool.input_shard(index),), device=device_name(device),
                        batch_size=scorer.batch_size, seconds=time.monotonic() - start)
    return done


def measure_spread(features: ShardFolder, indices: Sequence[int], prompts: Sequence[str]) -> list[float]:
    """Mean of 1 - cosine over all pairs of each prompt's images, in 0..2, in the order of `prompts`."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for index in indices:
        table = features.read(index)
        columns = (table[name].to_pylist() for name in SCHEMA.names)
        for key, image, feature in zip(*columns, strict=True):
            found.setdefault(key, {})[image] = np.frombuffer(feature, dtype=np.float32)
    stacked = np.stack([np.stack(list(found[prompt_id(prompt)].values())) for prompt in prompts])
    return mean_pairwise_distance(torch.from_numpy(stacked)).tolist()
