"""Triplets: best and worst of each pool (arXiv:2405.20216v1, Eq. 6) as Parquet that other trainers read.

The first columns are Pick-a-Pic v2's, as the public Diffusion-DPO trainers read them; jpg_0 is the winner.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from hgdpo_core.config import UNKNOWN_LICENCE, TripletConfig, content_hash, identity
from hgdpo_core.errors import ConfigError, StoppedError
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.prompts import prompt_id
from hgdpo_core.selection import select_pair
from hgdpo_core.stages.dataset_card import render_card
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder

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
                **identity(config, later={"pool_size"})}
    return ShardFolder.create(store, f"triplets/{prompts_id.split('-')[0]}-{content_hash(settings)}", settings)


def build_triplets(pool: ShardFolder, scores: ShardFolder, triplets: ShardFolder, prompts: Sequence[str],
                   indices: Sequence[int], config: TripletConfig, *, progress: Progress = silent,
                   should_stop: ShouldStop = never_stop) -> TripletCounts:
    """One shard of triplets a shard of the pool, for the wanted prompts in it; found ones are kept.

    A pool without a pair is written to `rejected/` with its scores and the reason.
    """
    wanted = {prompt_id(prompt) for prompt in prompts}
    pool_manifests, score_manifests = pool.manifests(), scores.manifests()
    counted = triplets.manifests()
    for done, index in enumerate(indices, start=1):
        inputs = (pool.input_shard(index, manifest=pool_manifests[index]),
                  scores.input_shard(index, manifest=score_manifests[index]))
        if index not in counted or counted[index].inputs != inputs:
            if should_stop():
                raise StoppedError("stopped while ranking pools; finished shards are kept")
            start = time.monotonic()
            table, rejected = _select(pool, scores, index, wanted, config)
            if rejected.num_rows:
                triplets.reject(f"shard-{index:05d}", rejected)
            counted[index] = triplets.commit(index, table, inputs=inputs, seconds=time.monotonic() - start,
                                             details={"rejected": rejected.num_rows})
            progress(done, len(indices), "shards")
    return TripletCounts(sum(counted[i].rows for i in indices), sum(counted[i].details["rejected"] for i in indices))


def _select(pool: ShardFolder, scores: ShardFolder, index: int, wanted: set[str],
            config: TripletConfig) -> tuple[pa.Table, pa.Table]:
    rows, rejected = [], []
    settings = pool.config
    for candidates in read_ranked_pools(pool, scores, index, config.pool_size):
        if candidates.prompt_id not in wanted:
            continue
        winners, losers = select_pair(torch.tensor([candidates.scores]), loser_rank=config.loser_rank)
        winner, loser = int(winners[0]), int(losers[0])
        if winner < 0:
            finite = bool(np.isfinite(candidates.scores).all())
            reason = "winner and loser score the same" if finite else "a score is not finite"
            rejected.append({"prompt_id": candidates.prompt_id, "prompt": candidates.prompt,
                             "scores": candidates.scores, "reason": reason})
            continue
        rows.append(_row(candidates, winner, loser, config, pool.key, settings, scores.config))
    return (pa.Table.from_pylist(rows, schema=SCHEMA), pa.Table.from_pylist(rejected, schema=REJECTED_SCHEMA))


@dataclass(frozen=True)
class RankedPool:
    """One prompt's candidates with their scores, in index order."""

    prompt_id: str
    prompt: str
    images: list[bytes]
    seeds: list[int]
    scores: list[float]


def read_ranked_pools(pool: ShardFolder, scores: ShardFolder, index: int,
                      pool_size: int | None = None) -> Iterator[RankedPool]:
    """The pools of one shard, joined with their scores by prompt and index; of each its first `pool_size` images.

    Seeds do not depend on N, so these are what a run with a smaller pool would have drawn.
    """
    images, values = pool.read(index), scores.read(index)
    by_key = {(p, i): s for p, i, s in zip(values["prompt_id"].to_pylist(), values["index"].to_pylist(),
                                           values["score"].to_pylist(), strict=True)}
    grouped: dict[str, list[dict]] = {}
    for row in images.select(["prompt_id", "prompt", "index", "seed", "image"]).to_pylist():
        grouped.setdefault(row["prompt_id"], []).append(row)
    for key, candidates in grouped.items():
        candidates = sorted(candidates, key=lambda row: row["index"])[:pool_size]
        yield RankedPool(key, candidates[0]["prompt"], [row["image"] for row in candidates],
                         [row["seed"] for row in candidates], [by_key[key, row["index"]] for row in candidates])


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
    manifests = triplets.manifests()
    return render_card(triplets, [manifests[index] for index in sorted(indices)], rows=counts.triplets,
                       rejected=counts.rejected, licence=licence)
