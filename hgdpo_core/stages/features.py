"""Image features of a pool by a scorer's own image tower: how much the images of one prompt differ (Figure 8)."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from hgdpo_core.config import ScorerConfig
from hgdpo_core.config.base import content_hash
from hgdpo_core.metrics import mean_pairwise_distance
from hgdpo_core.prompts import prompt_id
from hgdpo_core.scorers import ImageEmbedder, find_scorer, load_embedder, preparation
from hgdpo_core.stages.base import Computer, Worker
from hgdpo_core.stages.encoding import row_bytes
from hgdpo_core.stages.scores import Measuring, ScoreStage, score_settings
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder

SCHEMA = pa.schema([("prompt_id", pa.string()), ("index", pa.int32()), ("feature", pa.binary())])


def feature_folder(store: Store, pool_id: str, scorer: ScorerConfig) -> ShardFolder:
    """The folder of a pool's features by a scorer's image tower: float32 vectors as bytes."""
    settings = {**score_settings(pool_id, scorer, find_scorer(scorer.name, scorer.source)), "stage": "features"}
    return ShardFolder.create(store, f"features/{pool_id}/{scorer.name}-{content_hash(settings)}", settings)


@dataclass(frozen=True)
class FeatureStage(ScoreStage):
    """Features of a pool's images: made from the same shards as scores, by the same networks."""

    name, doing = "features", "embedding images"
    schema = SCHEMA
    create_folder = staticmethod(feature_folder)

    def load(self, worker: Worker) -> AbstractContextManager[Computer]:
        embedder: ImageEmbedder = worker.network or load_embedder(self.scorer, worker.device)

        def embed(images: list[Any], prompts: list[str]) -> list[bytes]:
            return row_bytes(embedder.embed_images(images))

        return nullcontext(Measuring(self, preparation(embedder), embed, self.scorer.batch_size))


def measure_spread(features: ShardFolder, indices: Sequence[int], prompts: Sequence[str]) -> list[float]:
    """Mean of 1 - cosine over all pairs of each prompt's images, in 0..2, in the order of `prompts`."""
    vectors: dict[str, list[np.ndarray]] = {}
    for index in indices:
        for row in features.read(index).to_pylist():
            vectors.setdefault(row["prompt_id"], []).append(np.frombuffer(row["feature"], dtype=np.float32))
    stacked = np.stack([np.stack(vectors[prompt_id(prompt)]) for prompt in prompts])
    return mean_pairwise_distance(torch.from_numpy(stacked)).tolist()
