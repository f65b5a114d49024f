"""Triplets: best and worst of each pool (arXiv:2405.20216v1, Eq. 6) as Parquet that other trainers read.

The first columns are Pick-a-Pic v2's, as the public Diffusion-DPO trainers read them; jpg_0 is the winner.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch

from hgdpo_core.config import UNKNOWN_LICENCE, TripletConfig
from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import ConfigError
from hgdpo_core.models.sizes import ModelSize
from hgdpo_core.prompts import PromptList, load_prompts, prompt_id
from hgdpo_core.selection import select_pair
from hgdpo_core.stages.base import Advance, Computer, ShardRows, Stage, Worker, shards_like
from hgdpo_core.stages.dataset_card import render_card
from hgdpo_core.stages.pool import SCHEMA as POOL_SCHEMA
from hgdpo_core.stages.pool import PoolPlan, image_size, images_kept
from hgdpo_core.stages.scores import SCHEMA as SCORE_SCHEMA
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
    """The folder of the triplets of a pool, its scores and a list of prompts; another ranking is another data set.

    ConfigError when `config.pool_size` is more than the pool holds.
    """
    images = pool.config["images_per_prompt"]
    if config.pool_size is not None and config.pool_size > images:
        raise ConfigError(f"pool_size is {config.pool_size}, but {pool.key} holds {images} images per prompt: "
                          f"choose a size from 2 to {images}")
    settings = {"stage": "triplets", "pool": pool.key, "scores": scores.key, "prompts_id": prompts_id,
                **config.identity()}
    return ShardFolder.create(store, f"triplets/{prompts_id.split('-')[0]}-{content_hash(settings)}", settings)


@dataclass(frozen=True)
class TripletStage(Stage):
    """Best and worst of each pool, for the requested prompts; pools without a pair are rejected with the reason."""

    name, unit, doing = "triplets", "prompts", "ranking pools"
    runs_on_workers = False
    reads, read_schemas = ("pool", "scores"), (POOL_SCHEMA, SCORE_SCHEMA)

    pool: ShardFolder
    scores: ShardFolder
    folder: ShardFolder
    prompts: frozenset[str]
    """Ids of the requested prompts."""
    config: TripletConfig
    requested: tuple[int, ...]
    title: str = "triplets"
    expected: Mapping[int, int] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, plan: PoolPlan, scores: ShardFolder, prompts: PromptList, config: TripletConfig) -> Self:
        """The triplets of a planned pool's shards, or of those among them that hold these prompts."""
        folder = triplet_folder(plan.folder.store, plan.folder, scores, prompts.id, config)
        return cls(plan.folder, scores, folder, frozenset(map(prompt_id, prompts.prompts)), config,
                   tuple(plan.indices), expected=plan.expected_rows(plan.indices))

    def units(self, indices: Iterable[int], sources: Sequence[Mapping[int, ShardManifest]]) -> dict[int, int]:
        size = images_kept(self.pool)
        return {index: images // size for index, images in super().units(indices, sources).items()}

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) of all images in pixels."""
        return image_size(self.pool)

    def recipe(self, *, copy_to_store: bool = False) -> dict[str, Any]:
        return {"triplets": self.config.model_dump(mode="json")}

    @classmethod
    def open(cls, folder: ShardFolder, recipe: Mapping[str, Any], indices: Sequence[int]) -> Self:
        store, config = folder.store, folder.config
        prompts = load_prompts(store, config["prompts_id"])
        pool, scores = (ShardFolder.open(store, config[name]) for name in cls.reads)
        return cls(pool, scores, folder, frozenset(map(prompt_id, prompts.prompts)),
                   TripletConfig.model_validate(recipe["triplets"]), tuple(indices))

    def load(self, worker: Worker) -> AbstractContextManager[Computer]:
        return nullcontext(_Ranking(self))

    def comparable(self) -> Iterator[ShardManifest]:
        return shards_like(self.folder.store, "triplets")

    def unit_bytes(self, size: ModelSize, image_bytes: float) -> float:
        return 2 * image_bytes + TRIPLET_BYTES

    def counts(self, made: Mapping[int, ShardManifest] | None = None) -> TripletCounts:
        """What became of the requested pools whose shards exist (`made`, if the caller has looked already)."""
        manifests = (self.existing() if made is None else made).values()
        return TripletCounts(sum(manifest.rows for manifest in manifests),
                             sum(manifest.details["rejected"] for manifest in manifests))


@dataclass
class _Ranking(Computer):
    """Ranks the pools of a shard."""

    stage: TripletStage
    batch_size: int | None = None

    def compute(self, index: int, tables: Sequence[pa.Table], batches: Iterator[Any], worker: Worker,
                advance: Advance) -> ShardRows:
        worker.check_stop(TripletStage.doing)
        images, scores = tables
        stage, rows, rejected = self.stage, [], []
        pools = join_scores(images, scores, stage.config.pool_size)
        requested = [pool for pool in pools if pool.prompt_id in stage.prompts]
        for pool, (winner, loser) in zip(requested, _select(requested, stage.config.loser_rank), strict=True):
            if winner >= 0:
                rows.append(_row(stage, pool, winner, loser))
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


@dataclass(frozen=True)
class RankedPool:
    """One prompt's images with their scores, in the order of `indices`, the numbers of the candidates."""

    prompt_id: str
    prompt: str
    indices: list[int]
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
    pools = {key: sorted(rows, key=lambda row: row["index"])[:pool_size] for key, rows in grouped.items()}
    return [RankedPool(key, rows[0]["prompt"], [row["index"] for row in rows], [row["image"] for row in rows],
                       [row["seed"] for row in rows], [by_prompt[key][row["index"]] for row in rows])
            for key, rows in pools.items()]


def read_ranked_pools(pool: ShardFolder, scores: ShardFolder, index: int,
                      pool_size: int | None = None) -> list[RankedPool]:
    """`join_scores` of a shard of the store."""
    return join_scores(pool.read(index), scores.read(index), pool_size)


def _row(stage: TripletStage, pool: RankedPool, winner: int, loser: int) -> dict[str, Any]:
    uids, identity = [f"{pool.prompt_id}-{pool.seeds[i]:016x}" for i in (winner, loser)], stage.pool.config["model"]
    model = identity["fingerprint"]
    return {
        "jpg_0": pool.images[winner], "jpg_1": pool.images[loser], "label_0": 1.0, "label_1": 0.0,
        "caption": pool.prompt, "best_image_uid": uids[0], "image_0_uid": uids[0], "image_1_uid": uids[1],
        "model_0": model, "model_1": model, "has_label": True, "are_different": True,
        "prompt_id": pool.prompt_id, "winner_index": pool.indices[winner], "loser_index": pool.indices[loser],
        "winner_score": pool.scores[winner], "loser_score": pool.scores[loser],
        "winner_seed": pool.seeds[winner], "loser_seed": pool.seeds[loser], "pool_size": len(pool.images),
        "loser_rank": stage.config.loser_rank or len(pool.images), "pool_id": stage.pool.key.split("/")[-1],
        "model_fingerprint": model_fingerprint(identity), "scorer_fingerprint": stage.scores.config["fingerprint"],
    }


def model_fingerprint(identity: Mapping) -> str:
    """One hash of a model's weights, LoRA and text settings; its precision and location do not count."""
    names = ("fingerprint", "negative_prompt", "clip_skip", "lora", "prompt_syntax", "negative_syntax")
    return content_hash({name: identity[name] for name in names if name in identity}, 64)


def write_dataset_card(stage: TripletStage, licence: str = UNKNOWN_LICENCE) -> None:
    """Write the card (README.md) beside the shards, once all of them exist; `licence`: a hub id, as cc-by-4.0."""
    made = stage.existing()
    if len(made) == len(stage.requested):
        counts, key, store = stage.counts(made), f"{stage.folder.key}/README.md", stage.folder.store
        card = render_card(stage.folder, [made[index] for index in sorted(made)], schema=SCHEMA, rows=counts.triplets,
                           rejected=counts.rejected, licence=licence).encode()
        if store.read_many([key]).get(key) != card:
            store.write_bytes(key, card)
