"""Triplets: best and worst of each pool (arXiv:2405.20216v1, Eq. 6) as Parquet that other trainers read.

The first columns are Pick-a-Pic v2's, as the public Diffusion-DPO trainers read them; jpg_0 is the winner.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import torch

from hgdpo_core.config import UNKNOWN_LICENCE, TripletConfig, content_hash
from hgdpo_core.errors import ConfigError
from hgdpo_core.models.sizes import ModelSize
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.prompts import PromptList, load_prompts, prompt_id
from hgdpo_core.selection import select_pair
from hgdpo_core.stages.base import Computer, ShardRows, Stage, Worker, shards_like
from hgdpo_core.stages.dataset_card import render_card
from hgdpo_core.stages.pool import PoolPlan, images_per_shard
from hgdpo_core.stages.scores import read_scores
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder, ShardManifest

TRIPLET_BYTES = 400.0  # a triplet's texts and numbers, beside its two images
SCHEMA = pa.schema([
    ("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64()), ("label_1", pa.float64()),
    ("caption", pa.string()), ("best_image_uid", pa.string()), ("image_0_uid", pa.string()),
    ("image_1_uid", pa.string()), ("model_0", pa.string()), ("model_1", pa.string()), ("has_label", pa.bool_()),
    ("are_different", pa.bool_()),
    ("prompt_id", pa.string()), ("winner_index", pa.int32()), ("loser_index", pa.int32()),
    ("winner_score", pa.float32()), ("loser_score", pa.float32()), ("winner_seed", pa.int64()),
    ("loser_seed", pa.int64()), ("pool_size", pa.int32()), ("loser_rank", pa.int32()), ("pool_id", pa.string()),
    ("model_fingerprint", pa.string()), ("scorer_fingerprint", pa.string()),
])
REJECTED_SCHEMA = pa.schema([("prompt_id", pa.string()), ("prompt", pa.string()), ("scores", pa.list_(pa.float32())),
                             ("reason", pa.string())])


@dataclass(frozen=True)
class TripletCounts:
    """What became of the pools."""

    triplets: int
    rejected: int


def triplet_folder(store: Store, pool: ShardFolder, scores: ShardFolder, prompts_id: str,
                   config: TripletConfig) -> ShardFolder:
    """Where the triplets of a pool, its scores and a list of prompts lie; another ranking is another data set.

    ConfigError when `config.pool_size` is more than the pool holds.
    """
    held = pool.config["images_per_prompt"]
    if config.pool_size is not None and config.pool_size > held:
        raise ConfigError(f"pool_size is {config.pool_size}, but {pool.key} holds {held} images a prompt: "
                          f"choose a size from 2 to {held}")
    settings = {"stage": "triplets", "pool": pool.key, "scores": scores.key, "prompts_id": prompts_id,
                **config.identity()}
    return ShardFolder.create(store, f"triplets/{prompts_id.split('-')[0]}-{content_hash(settings)}", settings)


@dataclass(frozen=True)
class TripletStage(Stage):
    """Best and worst of each pool, for the requested prompts; pools without a pair are rejected with the reason."""

    name: ClassVar[str] = "triplets"
    unit: ClassVar[str] = "prompts"
    doing: ClassVar[str] = "ranking pools"
    runs_on_workers: ClassVar[bool] = False

    pool: ShardFolder
    scores: ShardFolder
    folder: ShardFolder
    prompts: frozenset[str]
    """Ids of the requested prompts."""
    config: TripletConfig
    requested: tuple[int, ...]
    title: str = "triplets"
    prompts_in_shard: Mapping[int, int] = field(default_factory=dict, repr=False)
    """How many prompts each shard of the pool holds, where a plan knows it."""

    @classmethod
    def of(cls, plan: PoolPlan, scores: ShardFolder, prompts: PromptList, config: TripletConfig) -> Self:
        """The triplets of a planned pool's shards, or of those among them that hold these prompts."""
        folder = triplet_folder(plan.folder.store, plan.folder, scores, prompts.id, config)
        return cls(plan.folder, scores, folder, frozenset(map(prompt_id, prompts.prompts)), config,
                   tuple(plan.indices), prompts_in_shard={shard.index: len(shard.prompts) for shard in plan.shards})

    @property
    def indices(self) -> list[int]:
        return list(self.requested)

    @property
    def sources(self) -> tuple[ShardFolder, ...]:
        return (self.pool, self.scores)

    def units(self, indices: Iterable[int], sources: Sequence[Mapping[int, ShardManifest]]) -> dict[int, int]:
        size = self.pool.config["images_per_prompt"]
        return {index: sources[0][index].rows // size if index in sources[0] else self.prompts_in_shard.get(index, 0)
                for index in indices}

    def recipe(self, *, copy_to_store: bool = False) -> dict[str, Any]:
        return {"triplets": self.config.model_dump(mode="json")}

    @classmethod
    def open(cls, folder: ShardFolder, recipe: Mapping[str, Any], indices: Sequence[int]) -> Self:
        store, config = folder.store, folder.config
        prompts = load_prompts(store, config["prompts_id"])
        return cls(ShardFolder.open(store, config["pool"]), ShardFolder.open(store, config["scores"]), folder,
                   frozenset(map(prompt_id, prompts.prompts)), TripletConfig.model_validate(recipe["triplets"]),
                   tuple(indices))

    @contextmanager
    def load(self, worker: Worker) -> Iterator[Computer]:
        yield _Ranking(self)

    @property
    def images_per_shard(self) -> int:
        return images_per_shard(self.pool)

    @property
    def work(self) -> str:
        return "rank"

    def comparable(self) -> Iterator[ShardManifest]:
        return shards_like(self.folder.store, "triplets")

    def unit_bytes(self, size: ModelSize, image_bytes: float) -> float:
        return 2 * image_bytes + TRIPLET_BYTES

    def counts(self, made: Mapping[int, ShardManifest] | None = None) -> TripletCounts:
        """What became of the requested pools whose shards are there (`made`, if the caller has looked already)."""
        manifests = (self.existing() if made is None else made).values()
        return TripletCounts(sum(manifest.rows for manifest in manifests),
                             sum(manifest.details["rejected"] for manifest in manifests))


class _Ranking:
    """Ranks the pools of a shard."""

    batch_size: int | None = None

    def __init__(self, stage: TripletStage):
        self._stage = stage

    def compute(self, index: int, tables: Sequence[pa.Table], worker: Worker,
                advance: Callable[[int], None]) -> ShardRows:
        worker.check_stop(TripletStage.doing)
        images, scores = tables
        stage, rows, rejected = self._stage, [], []
        pools = join_scores(images, scores, stage.config.pool_size)
        requested = [pool for pool in pools if pool.prompt_id in stage.prompts]
        for pool, (winner, loser) in zip(requested, _select(requested, stage.config.loser_rank), strict=True):
            if winner >= 0:
                rows.append(_row(pool, winner, loser, stage.config, stage.pool.key, stage.pool.config,
                                 stage.scores.config))
                continue
            finite = bool(np.isfinite(pool.scores).all())
            rejected.append({"prompt_id": pool.prompt_id, "prompt": pool.prompt, "scores": pool.scores,
                             "reason": "winner and loser score the same" if finite else "a score is not finite"})
        advance(len(pools))
        return ShardRows(pa.Table.from_pylist(rows, schema=SCHEMA),
                         pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA), {"rejected": len(rejected)})


def _select(pools: Sequence["RankedPool"], loser_rank: int | None) -> list[tuple[int, int]]:
    """Winner and loser of each pool, all of one size; -1 for a pool without a pair."""
    if not pools:
        return []
    winners, losers = select_pair(torch.tensor([pool.scores for pool in pools]), loser_rank=loser_rank)
    return list(zip(winners.tolist(), losers.tolist(), strict=True))


def build_triplets(pool: ShardFolder, scores: ShardFolder, triplets: ShardFolder, prompts: Sequence[str],
                   indices: Sequence[int], config: TripletConfig, *, progress: Progress = silent,
                   should_stop: ShouldStop = never_stop) -> TripletCounts:
    """Make the missing shards among `indices` here, for the requested prompts in them; returns all their counts."""
    stage = TripletStage(pool, scores, triplets, frozenset(map(prompt_id, prompts)), config, tuple(indices))
    stage.make(Worker("cpu", progress, should_stop))
    return stage.counts()


@dataclass(frozen=True)
class RankedPool:
    """One prompt's candidates with their scores, in index order."""

    prompt_id: str
    prompt: str
    images: list[bytes]
    seeds: list[int]
    scores: list[float]


def join_scores(images: pa.Table, scores: pa.Table, pool_size: int | None = None) -> list[RankedPool]:
    """The pools of one shard with their scores, joined by prompt and index; of each its first `pool_size` images.

    Seeds do not depend on N, so these are what a run with a smaller pool would have generated.
    """
    by_prompt = read_scores(scores)
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in images.select(["prompt_id", "prompt", "index", "seed", "image"]).to_pylist():
        grouped.setdefault(row["prompt_id"], []).append(row)
    pools = []
    for key, candidates in grouped.items():
        candidates = sorted(candidates, key=lambda row: row["index"])[:pool_size]
        pools.append(RankedPool(key, candidates[0]["prompt"], [row["image"] for row in candidates],
                                [row["seed"] for row in candidates],
                                [by_prompt[key][row["index"]] for row in candidates]))
    return pools


def read_ranked_pools(pool: ShardFolder, scores: ShardFolder, index: int,
                      pool_size: int | None = None) -> list[RankedPool]:
    """`join_scores` of a shard that lies in the store."""
    return join_scores(pool.read(index), scores.read(index), pool_size)


def _row(pool: RankedPool, winner: int, loser: int, config: TripletConfig, pool_key: str,
         pool_settings: Mapping, score_settings: Mapping) -> dict:
    uids = [f"{pool.prompt_id}-{pool.seeds[i]:016x}" for i in (winner, loser)]
    model = pool_settings["model"]["fingerprint"]
    return {
        "jpg_0": pool.images[winner], "jpg_1": pool.images[loser], "label_0": 1.0, "label_1": 0.0,
        "caption": pool.prompt, "best_image_uid": uids[0], "image_0_uid": uids[0], "image_1_uid": uids[1],
        "model_0": model, "model_1": model, "has_label": True, "are_different": True,
        "prompt_id": pool.prompt_id, "winner_index": winner, "loser_index": loser,
        "winner_score": pool.scores[winner], "loser_score": pool.scores[loser],
        "winner_seed": pool.seeds[winner], "loser_seed": pool.seeds[loser], "pool_size": len(pool.images),
        "loser_rank": config.loser_rank or len(pool.images), "pool_id": pool_key.split("/")[-1],
        "model_fingerprint": model_fingerprint(pool_settings["model"]),
        "scorer_fingerprint": score_settings["fingerprint"],
    }


def model_fingerprint(identity: Mapping) -> str:
    """One hash of a model's weights, LoRA and text settings; its precision and place do not count."""
    names = ("fingerprint", "negative_prompt", "clip_skip", "lora", "prompt_syntax", "negative_syntax")
    return content_hash({name: identity[name] for name in names if name in identity}, 64)


def dataset_card(triplets: ShardFolder, indices: Sequence[int], counts: TripletCounts, *,
                 licence: str = UNKNOWN_LICENCE) -> str:
    """README.md of the data set, with the `data_files` that `datasets.load_dataset` must read: what manifests name.

    `licence`: an id of the Hugging Face hub, as cc-by-4.0.
    """
    manifests = triplets.manifests(indices)
    return render_card(triplets, [manifests[index] for index in sorted(indices)], rows=counts.triplets,
                       rejected=counts.rejected, licence=licence)


def write_dataset_card(stage: TripletStage, licence: str = UNKNOWN_LICENCE) -> None:
    """Put the card beside the shards, once all of them are there."""
    made = stage.existing()
    if len(made) == len(stage.requested):
        card = dataset_card(stage.folder, stage.indices, stage.counts(made), licence=licence)
        key, store = f"{stage.folder.key}/README.md", stage.folder.store
        if store.read_many([key]).get(key) != card.encode():
            store.write_bytes(key, card.encode())
