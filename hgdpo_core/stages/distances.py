"""How far the latents of a pool's n-th best image are from its best one, in their channel statistics (Figure 5b)."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch

from hgdpo_core.config.base import content_hash
from hgdpo_core.images import decode_image
from hgdpo_core.metrics import latent_distance
from hgdpo_core.models import Model
from hgdpo_core.models.backbone import LatentCodec
from hgdpo_core.models.locations import find_located_model
from hgdpo_core.models.sizes import ModelSize
from hgdpo_core.parallel import thread_map
from hgdpo_core.stages.base import Advance, Computer, ShardRows, Worker
from hgdpo_core.stages.encoding import EncodingStage, stack_pixels
from hgdpo_core.stages.pool import SCHEMA as POOL_SCHEMA
from hgdpo_core.stages.pool import PoolPlan, image_size
from hgdpo_core.stages.probes import ENCODE_BATCH
from hgdpo_core.stages.scores import SCHEMA as SCORE_SCHEMA
from hgdpo_core.stages.triplets import RankedPool, join_scores
from hgdpo_core.storage.shards import ShardFolder, ShardManifest

MEASURED_POOLS = 32  # for the curve of the report; more only make it smoother
SCHEMA = pa.schema([("prompt_id", pa.string()), ("rank", pa.int32()), ("mean_distance", pa.float32()),
                    ("deviation_distance", pa.float32())])


def distance_folder(pool: ShardFolder, scores: ShardFolder, model: Model) -> ShardFolder:
    """The folder of the distances within a pool, ranked by its scores, in the latents of a model's VAE."""
    settings = {"stage": "distances", "pool": pool.key, "scores": scores.key, "model": model.identity(),
                **model.encoding()}
    pool_id = pool.key.rpartition("/")[2]
    return ShardFolder.create(pool.store, f"latent_distances/{pool_id}/{content_hash(settings)}", settings)


def first_shards(pool: PoolPlan, pools: int) -> list[int]:
    """The first shards that hold `pools` pools together, or all."""
    before = itertools.accumulate((len(shard.prompts) for shard in pool.shards), initial=0)
    return [shard.index for shard, held in zip(pool.shards, before, strict=False) if held < pools]


@dataclass(frozen=True)
class DistanceStage(EncodingStage):
    """Latent distances within some of a pool's shards; pools with a score that is not finite are left out."""

    name, doing = "distances", "measuring latent distances"
    reads, row_bytes, read_schemas = ("pool", "scores"), 12.0, (POOL_SCHEMA, SCORE_SCHEMA)

    pool: ShardFolder
    scores: ShardFolder
    folder: ShardFolder
    model: Model
    requested: tuple[int, ...]
    title: str = "latent distances"
    expected: Mapping[int, int] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, plan: PoolPlan, scores: ShardFolder, model: Model, pools: int = MEASURED_POOLS) -> Self:
        """The distances within the first shards of a planned pool that hold `pools` pools together.

        Of a raced pool none: its n-th best image was not finished.
        """
        indices = [] if plan.pool.race else first_shards(plan, pools)
        return cls(plan.folder, scores, distance_folder(plan.folder, scores, model), model, tuple(indices),
                   expected=plan.expected_rows(indices))

    @property
    def size(self) -> tuple[int, int]:
        return image_size(self.pool)

    def units(self, indices: Iterable[int], sources: Sequence[Mapping[int, ShardManifest]]) -> dict[int, int]:
        size = self.pool.config["images_per_prompt"]  # all but the best of each pool are measured
        return {index: images * (size - 1) // size for index, images in super().units(indices, sources).items()}

    @classmethod
    def open(cls, folder: ShardFolder, recipe: Mapping[str, Any], indices: Sequence[int]) -> Self:
        pool, scores = (ShardFolder.open(folder.store, folder.config[name]) for name in cls.reads)
        return cls(pool, scores, folder, find_located_model(folder.store, folder.config["model"], recipe),
                   tuple(indices))

    def load(self, worker: Worker) -> AbstractContextManager[Computer]:
        return nullcontext(_Measuring(self.backbone(worker.device).codec, ENCODE_BATCH))

    def unit_bytes(self, size: ModelSize, image_bytes: float) -> float:
        return self.row_bytes

    def read(self) -> np.ndarray:
        """Distances of channel means and of channel standard deviations, float64 [pools, N - 1, 2].

        Row n - 2 of a pool is its n-th best image compared with its best.
        """
        if not self.requested:
            return np.empty((0, self.pool.config["images_per_prompt"] - 1, 2))
        rows = pa.concat_tables([self.folder.read(index) for index in self.requested])
        columns = [rows[name].to_numpy() for name in ("mean_distance", "deviation_distance")]
        return np.stack(columns, axis=-1).reshape(-1, self.pool.config["images_per_prompt"] - 1, 2).astype(np.float64)


@dataclass
class _Measuring(Computer):
    """A codec that encodes ranked pools."""

    codec: LatentCodec
    batch_size: int | None

    def batches(self, index: int, tables: Sequence[pa.Table]) -> Iterator[tuple[RankedPool, torch.Tensor | None]]:
        """Each pool with its pixels float32 [N, 3, H, W] in [-1, 1], best first; without, where not all are scored."""
        for ranked in join_scores(*tables):
            if np.isfinite(ranked.scores).all():
                order = np.argsort(-np.array(ranked.scores), kind="stable")
                yield ranked, stack_pixels(thread_map(decode_image, [ranked.images[i] for i in order]))
            else:
                yield ranked, None

    def compute(self, index: int, tables: Sequence[pa.Table], batches: Iterator[Any], worker: Worker,
                advance: Advance) -> ShardRows:
        rows: list[dict[str, Any]] = []
        for ranked, pixels in batches:
            if pixels is not None:
                rows += self._rows(ranked.prompt_id, pixels)
            advance(len(ranked.images) - 1)
        return ShardRows(pa.Table.from_pylist(rows, schema=SCHEMA))

    def _rows(self, prompt_id: str, pixels: torch.Tensor) -> list[dict[str, Any]]:
        assert self.batch_size is not None
        latents = torch.cat([self.codec.encode(batch) for batch in pixels.split(self.batch_size)])
        means, deviations = latent_distance(latents[:1].expand(len(latents) - 1, -1, -1, -1), latents[1:])
        return [{"prompt_id": prompt_id, "rank": rank, "mean_distance": mean, "deviation_distance": deviation}
                for rank, (mean, deviation) in enumerate(zip(means.tolist(), deviations.tolist(), strict=True),
                                                         start=2)]
