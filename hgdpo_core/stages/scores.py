"""Scoring of pools (arXiv:2405.20216v1, Eq. 5): every score is of the decoded stored bytes, so it can be repeated."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from hgdpo_core.config import PromptSyntax, ScorerConfig, content_hash
from hgdpo_core.errors import StoppedError
from hgdpo_core.images import decode_image
from hgdpo_core.models import default_device, device_name, recorded_syntax
from hgdpo_core.parallel import threads
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.prompts.syntax import strip_syntax
from hgdpo_core.scorers import Scorer, find_scorer, load_judge
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder, ShardManifest

SCHEMA = pa.schema([("prompt_id", pa.string()), ("index", pa.int32()), ("score", pa.float32())])


def score_folder(store: Store, pool_id: str, scorer: ScorerConfig) -> ShardFolder:
    """Where the scores of a pool by a scorer lie: another version or precision of its weights is another folder."""
    settings = score_settings(pool_id, scorer, find_scorer(scorer.name, scorer.source))
    return ShardFolder.create(store, score_key(settings), settings)


def score_settings(pool_id: str, scorer: ScorerConfig, fingerprint: str) -> dict[str, Any]:
    """All that decides the scores of a pool: its images, and the judge's weights and precision."""
    return {"stage": "score", "pool_id": pool_id, "scorer": scorer.name, "dtype": scorer.dtype,
            "fingerprint": fingerprint}


def score_key(settings: Mapping[str, Any]) -> str:
    """The folder of scores made with these `score_settings`."""
    return f"scores/{settings['pool_id']}/{settings['scorer']}-{content_hash(settings)}"


def missing_scores(pool: ShardFolder, scores: ShardFolder, indices: Sequence[int], *,
                   pool_manifests: Mapping[int, ShardManifest] | None = None,
                   score_manifests: Mapping[int, ShardManifest] | None = None) -> list[int]:
    """The pool shards of `indices` whose scores are not there, or are of other bytes than the pool's today.

    Manifests that the caller has read already are not read again. StorageError for a pool shard that is not there (any
    more): its stage makes it again.
    """
    pool_manifests = pool.manifests(indices) if pool_manifests is None else pool_manifests
    score_manifests = scores.manifests(indices) if score_manifests is None else score_manifests
    return [index for index in indices
            if index not in score_manifests
            or score_manifests[index].inputs != (pool.input_shard(index, manifest=pool_manifests.get(index)),)]


def score_pool(store: Store, pool: ShardFolder, scores: ShardFolder, scorer: ScorerConfig, indices: Sequence[int], *,
               device: str | None = None, judge: Scorer | None = None, progress: Progress = silent,
               should_stop: ShouldStop = never_stop) -> int:
    """Score the missing shards among `indices`, one shard of scores a shard of images; returns the images scored.

    `judge`: the scorer, already on `device`, where one serves several pools.
    The scorer reads prompts without the weights and brackets that the pool's model was given.
    """
    missing = missing_scores(pool, scores, indices)
    if not missing:
        return 0
    device = device or default_device()
    judge = judge or load_judge(scorer, device)
    syntax = recorded_syntax(pool.config["model"])["prompt_syntax"]
    total = sum(manifest.rows for manifest in pool.manifests(missing).values())
    done = 0
    for index in missing:
        start = time.monotonic()
        images = pool.read(index)
        source = pool.input_shard(index)
        values: list[float] = []
        for first in range(0, images.num_rows, scorer.batch_size):
            if should_stop():
                raise StoppedError("stopped while scoring; finished shards are kept")
            values += _score_rows(judge, images.slice(first, scorer.batch_size), syntax)
            progress(done + len(values), total, "images")
        done += len(values)
        table = pa.table({"prompt_id": images["prompt_id"], "index": images["index"], "score": values}, schema=SCHEMA)
        scores.commit(index, table, inputs=(source,), device=device_name(device), batch_size=scorer.batch_size,
                      seconds=time.monotonic() - start)
    return done


def _score_rows(judge: Scorer, rows: pa.Table, syntax: PromptSyntax) -> list[float]:
    images = list(threads().map(decode_image, rows["image"].to_pylist()))
    return judge.score(images, [strip_syntax(prompt, syntax) for prompt in rows["prompt"].to_pylist()]).tolist()
