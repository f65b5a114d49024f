"""How far the latents of a pool's n-th best image are from its best one, in their channel statistics (Figure 5b)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import torch

from hgdpo_core.config import content_hash
from hgdpo_core.images import decode_image, to_model_range
from hgdpo_core.metrics import latent_distance
from hgdpo_core.models import Model, load_backbone
from hgdpo_core.models.backbone import LatentCodec
from hgdpo_core.models.places import find_offered_model, model_means
from hgdpo_core.models.sizes import ModelSize
from hgdpo_core.parallel import threads
from hgdpo_core.stages.base import Computer, Probe, ShardRows, Stage, Worker
from hgdpo_core.stages.pool import PoolPlan, images_per_shard
from hgdpo_core.stages.probes import ENCODE_BATCH, probe_encoding
from hgdpo_core.stages.triplets import RankedPool, join_scores
from hgdpo_core.storage.shards import ShardFolder, ShardManifest

DISTANCE_BYTES = 12.0
MEASURED_POOLS = 32  # for the curve of the report; more only make it smoother
SCHEMA = pa.schema([("prompt_id", pa.string()), ("rank", pa.int32()), ("mean_distance", pa.float32()),
                    ("deviation_distance", pa.float32())])


def distance_folder(pool: ShardFolder, scores: ShardFolder, model: Model) -> ShardFolder:
    """Where the distances within a pool, ranked by its scores, in the latents of a model's VAE lie."""
    settings = {"stage": "distances", "pool": pool.key, "scores": scores.key, "model": model.identity(),
                **model.encoding()}
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


@dataclass(frozen=True)
class DistanceStage(Stage):
    """Latent distances within some of a pool's shards; pools with a score that is not finite are left out."""

    name: ClassVar[str] = "distances"
    doing: ClassVar[str] = "measuring latent distances"

    pool: ShardFolder
    scores: ShardFolder
    folder: ShardFolder
    model: Model
    requested: tuple[int, ...]
    title: str = "latent distances"
    images: Mapping[int, int] = field(default_factory=dict, repr=False)
    """Images that each shard of the pool holds, where a plan knows it."""

    @classmethod
    def of(cls, plan: PoolPlan, scores: ShardFolder, model: Model, pools: int = MEASURED_POOLS) -> Self:
        """The distances within the first shards of a planned pool that hold `pools` pools together."""
        indices = enough_shards(plan, pools)
        return cls(plan.folder, scores, distance_folder(plan.folder, scores, model), model, tuple(indices),
                   images=plan.units(indices))

    @property
    def indices(self) -> list[int]:
        return list(self.requested)

    @property
    def sources(self) -> tuple[ShardFolder, ...]:
        return (self.pool, self.scores)

    def units(self, indices: Iterable[int], sources: Sequence[Mapping[int, ShardManifest]]) -> dict[int, int]:
        size = self.pool.config["images_per_prompt"]
        rows = {index: sources[0][index].rows if index in sources[0] else self.images.get(index, 0)
                for index in indices}
        return {index: images * (size - 1) // size for index, images in rows.items()}  # all but the best of each pool

    def recipe(self, *, copy_to_store: bool = False) -> dict[str, Any]:
        return model_means(self.folder.store, self.model, share=copy_to_store)

    @classmethod
    def open(cls, folder: ShardFolder, recipe: Mapping[str, Any], indices: Sequence[int]) -> Self:
        pool, scores = (ShardFolder.open(folder.store, folder.config[name]) for name in ("pool", "scores"))
        return cls(pool, scores, folder, find_offered_model(folder.store, folder.config["model"], recipe),
                   tuple(indices))

    @contextmanager
    def load(self, worker: Worker) -> Iterator[Computer]:
        yield _Measuring(load_backbone(self.model, worker.device, codec_dtype="float32").codec)

    @property
    def images_per_shard(self) -> int:
        return images_per_shard(self.pool)

    @property
    def work(self) -> str:
        return "encode"

    def probe(self) -> Probe | None:
        sampler = self.pool.config["sampler"]
        return probe_encoding(self.model, (sampler["width"], sampler["height"]))

    def unit_bytes(self, size: ModelSize, image_bytes: float) -> float:
        return DISTANCE_BYTES

    def read(self) -> np.ndarray:
        """What was measured, float64 [pools, N - 1, 2]; see `read_distances`."""
        return read_distances(self.folder, self.requested, self.pool.config["images_per_prompt"])


class _Measuring:
    """A codec that encodes ranked pools."""

    def __init__(self, codec: LatentCodec):
        self._codec = codec
        self.batch_size: int | None = ENCODE_BATCH

    def compute(self, index: int, tables: Sequence[pa.Table], worker: Worker,
                advance: Callable[[int], None]) -> ShardRows:
        rows: list[dict[str, Any]] = []
        for ranked in join_scores(*tables):
            worker.check_stop(DistanceStage.doing)
            if np.isfinite(ranked.scores).all():
                rows += self._rows(ranked)
            advance(len(ranked.images) - 1)
        return ShardRows(pa.Table.from_pylist(rows, schema=SCHEMA))

    def _rows(self, pool: RankedPool) -> list[dict[str, Any]]:
        order = np.argsort(-np.array(pool.scores), kind="stable")
        latents = self._encode([pool.images[i] for i in order])
        means, deviations = latent_distance(latents[:1].expand(len(order) - 1, -1, -1, -1), latents[1:])
        return [{"prompt_id": pool.prompt_id, "rank": rank, "mean_distance": mean, "deviation_distance": deviation}
                for rank, (mean, deviation) in enumerate(zip(means.tolist(), deviations.tolist(), strict=True),
                                                         start=2)]

    def _encode(self, images: Sequence[bytes]) -> torch.Tensor:
        """Scaled latents float32 [B, C, h, w] of encoded images."""
        assert self.batch_size is not None
        pixels = [to_model_range(picture) for picture in threads().map(decode_image, images)]
        return torch.cat([self._codec.encode(torch.from_numpy(np.stack(pixels[start:start + self.batch_size])))
                          for start in range(0, len(pixels), self.batch_size)])


def read_distances(distances: ShardFolder, indices: Sequence[int], images_per_prompt: int) -> np.ndarray:
    """Distances of channel means and of channel standard deviations, float64 [pools, N - 1, 2].

    Row n - 2 of a pool is its n-th best image against its best.
    """
    rows = pa.concat_tables([distances.read(index) for index in indices])
    columns = [rows[name].to_numpy() for name in ("mean_distance", "deviation_distance")]
    return np.stack(columns, axis=-1).reshape(-1, images_per_prompt - 1, 2).astype(np.float64)
