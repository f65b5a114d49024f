"""Scoring of pools (arXiv:2405.20216v1, Eq. 5): every score is of the decoded stored bytes, so it can be repeated."""

import time
from collections.abc import Sequence

import pyarrow as pa

from hgdpo_core.config import PromptSyntax, ScorerConfig, content_hash
from hgdpo_core.errors import StoppedError
from hgdpo_core.images import decode_image
from hgdpo_core.models import DTYPES, default_device, device_name, recorded_syntax
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.prompt_syntax import strip_syntax
from hgdpo_core.scorers import Scorer, find_scorer, load_scorer
from hgdpo_core.scorers.pictures import threads
from hgdpo_core.shards import ShardFolder
from hgdpo_core.storage import Store

SCHEMA = pa.schema([("prompt_id", pa.string()), ("index", pa.int32()), ("score", pa.float32())])


def score_folder(store: Store, pool_id: str, scorer: ScorerConfig) -> ShardFolder:
    """Where the scores of a pool by a scorer lie: another version or precision of its weights is another folder."""
    settings = {"stage": "score", "pool_id": pool_id, "scorer": scorer.name, "dtype": scorer.dtype,
                "fingerprint": find_scorer(scorer.name, scorer.source)}
    return ShardFolder.create(store, f"scores/{pool_id}/{scorer.name}-{content_hash(settings)}", settings)


def missing_scores(pool: ShardFolder, scores: ShardFolder, indices: Sequence[int]) -> list[int]:
    """The pool shards of `indices` whose scores are not there, or are of other bytes than the pool's today."""
    pool_manifests, score_manifests = pool.manifests(), scores.manifests()
    return [index for index in indices
            if index not in score_manifests
            or score_manifests[index].inputs != (pool.input_shard(index, manifest=pool_manifests[index]),)]


def score_pool(store: Store, pool: ShardFolder, scores: ShardFolder, scorer: ScorerConfig, indices: Sequence[int], *,
               device: str | None = None, progress: Progress = silent, should_stop: ShouldStop = never_stop) -> int:
    """Score the missing shards among `indices`, one shard of scores a shard of images; returns the images scored.

    The scorer reads prompts without the weights and brackets that the pool's model was given.
    """
    missing = missing_scores(pool, scores, indices)
    if not missing:
        return 0
    device = device or default_device()
    judge = load_scorer(scorer.name, source=scorer.source, device=device, dtype=DTYPES[scorer.dtype])
    syntax = recorded_syntax(pool.config["model"])["prompt_syntax"]
    total = sum(pool.manifests()[index].rows for index in missing)
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
