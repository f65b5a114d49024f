"""Image features of a pool by a scorer's own image tower: how much the images of one prompt differ (Figure 8)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch

from hgdpo_core.config import ScorerConfig, content_hash
from hgdpo_core.devices import DTYPES, default_device
from hgdpo_core.images import decode_image
from hgdpo_core.metrics import mean_pairwise_distance
from hgdpo_core.parallel import threads
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.prompts import prompt_id
from hgdpo_core.scorers import ImageEmbedder, find_scorer, load_embedder
from hgdpo_core.stages.base import Computer, ShardRows, Worker
from hgdpo_core.stages.scores import ScoreStage, score_settings
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder

SCHEMA = pa.schema([("prompt_id", pa.string()), ("index", pa.int32()), ("feature", pa.binary())])


def feature_folder(store: Store, pool_id: str, scorer: ScorerConfig) -> ShardFolder:
    """Where the features of a pool by a scorer's image tower lie: float32 vectors as bytes."""
    settings = {**score_settings(pool_id, scorer, find_scorer(scorer.name, scorer.source)), "stage": "features"}
    return ShardFolder.create(store, f"features/{pool_id}/{scorer.name}-{content_hash(settings)}", settings)


@dataclass(frozen=True)
class FeatureStage(ScoreStage):
    """Features of a pool's images: made from the same shards as scores, by the same networks."""

    name: ClassVar[str] = "features"
    doing: ClassVar[str] = "embedding images"

    @staticmethod
    def _create_folder(store: Store, pool_id: str, scorer: ScorerConfig) -> ShardFolder:
        return feature_folder(store, pool_id, scorer)

    @contextmanager
    def load(self, worker: Worker) -> Iterator[Computer]:
        embedder = worker.network or load_embedder(self.scorer.name, source=self.scorer.source, device=worker.device,
                                                   dtype=DTYPES[self.scorer.dtype])
        yield _Embedding(embedder, self.scorer.batch_size)


class _Embedding:
    def __init__(self, embedder: ImageEmbedder, batch_size: int):
        self._embedder = embedder
        self.batch_size: int | None = batch_size

    def compute(self, index: int, tables: Sequence[pa.Table], worker: Worker,
                advance: Callable[[int], None]) -> ShardRows:
        (images,), vectors = tables, []
        assert self.batch_size is not None
        for first in range(0, images.num_rows, self.batch_size):
            worker.check_stop(FeatureStage.doing)
            data = images["image"].slice(first, self.batch_size).to_pylist()
            features = self._embedder.embed_images(list(threads().map(decode_image, data)))
            vectors += [vector.numpy().tobytes() for vector in features.float().cpu()]
            advance(len(data))
        return ShardRows(pa.table({"prompt_id": images["prompt_id"], "index": images["index"], "feature": vectors},
                                  schema=SCHEMA))


def embed_pool(pool: ShardFolder, features: ShardFolder, scorer: ScorerConfig, indices: Sequence[int], *,
               device: str | None = None, progress: Progress = silent, should_stop: ShouldStop = never_stop) -> int:
    """Embed the missing shards among `indices` here; returns the images embedded."""
    stage = FeatureStage(pool, features, scorer, tuple(indices), "features")
    return stage.make(Worker(device or default_device(), progress, should_stop))


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
