"""Scoring of pools (arXiv:2405.20216v1, Eq. 5): every score is of the decoded stored bytes, so it can be repeated."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import pyarrow as pa

from hgdpo_core.config import ScorerConfig
from hgdpo_core.config.base import content_hash
from hgdpo_core.scorers import Scorer, find_scorer, load_configured_scorer, preparation
from hgdpo_core.stages.base import (
    Advance,
    Computer,
    Probe,
    ShardRows,
    Stage,
    Worker,
    is_made_from,
    prepare_batches,
    shards_like,
)
from hgdpo_core.stages.located_scorer import find_located_scorer, locate_scorer, plain_scores, scorer_version
from hgdpo_core.stages.pool import SCHEMA as POOL_SCHEMA
from hgdpo_core.stages.pool import PoolPlan, image_size, images_kept, read_captions
from hgdpo_core.stages.probes import probe_scoring
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder, ShardManifest

SCHEMA = pa.schema([("prompt_id", pa.string()), ("index", pa.int32()), ("score", pa.float32())])


def score_folder(store: Store, pool_id: str, scorer: ScorerConfig) -> ShardFolder:
    """The folder of a pool's scores by a scorer: another version or precision of its weights is another folder."""
    settings = score_settings(pool_id, scorer, find_scorer(scorer.name, scorer.source))
    return ShardFolder.create(store, score_key(settings), settings)


def score_settings(pool_id: str, scorer: ScorerConfig, fingerprint: str) -> dict[str, Any]:
    """All that decides the scores of a pool: its images, and the scorer's weights and precision."""
    return {"stage": "score", "pool_id": pool_id, **scorer_version(scorer, fingerprint)}


def score_key(settings: Mapping[str, Any]) -> str:
    """The folder of scores made with these `score_settings`."""
    return f"scores/{settings['pool_id']}/{settings['scorer']}-{content_hash(settings)}"


def missing_scores(pool: ShardFolder, scores: ShardFolder, indices: Sequence[int], *,
                   pool_manifests: Mapping[int, ShardManifest] | None = None,
                   score_manifests: Mapping[int, ShardManifest] | None = None) -> list[int]:
    """The pool shards of `indices` whose scores do not exist, or are of other bytes than the pool's today.

    Manifests that the caller has read already are not read again.
    """
    sources = [(pool, pool.manifests(indices) if pool_manifests is None else pool_manifests)]
    manifests = scores.manifests(indices) if score_manifests is None else score_manifests
    return [index for index in indices if index not in manifests or not is_made_from(manifests[index], index, sources)]


@dataclass(frozen=True)
class ScoreStage(Stage):
    """Scores of a pool's shards by one scorer, one shard of scores for each shard of images."""

    name, doing = "score", "scoring"
    reads, row_bytes, read_schemas = ("pool",), 12.0, (POOL_SCHEMA,)
    schema = SCHEMA
    create_folder = staticmethod(score_folder)

    pool: ShardFolder
    folder: ShardFolder
    scorer: ScorerConfig
    requested: tuple[int, ...]
    title: str
    prompts: Mapping[int, tuple[str, ...]] = field(default_factory=dict, repr=False)
    """Prompts of each shard, where a plan knows them."""

    @classmethod
    def of(cls, plan: PoolPlan, scorer: ScorerConfig, *, title: str | None = None) -> Self:
        """The scores of a planned pool, titled as the scorer by default."""
        return cls(plan.folder, cls.create_folder(plan.folder.store, plan.pool_id, scorer), scorer,
                   tuple(plan.indices), title or scorer.name, {shard.index: shard.prompts for shard in plan.shards})

    @property
    def expected(self) -> Mapping[int, int]:
        images = images_kept(self.pool)
        return {index: images * len(prompts) for index, prompts in self.prompts.items()}

    def recipe(self, *, copy_to_store: bool = False) -> dict[str, Any]:
        return locate_scorer(self.folder.store, self.scorer, copy_to_store=copy_to_store)

    @classmethod
    def open(cls, folder: ShardFolder, recipe: Mapping[str, Any], indices: Sequence[int]) -> Self:
        scorer = find_located_scorer(folder.store, recipe, folder.config["fingerprint"])
        pool = ShardFolder.open(folder.store, f"pools/{folder.config['pool_id']}")
        return cls(pool, folder, scorer, tuple(indices), scorer.name)

    def load(self, worker: Worker) -> AbstractContextManager[Computer]:
        scorer: Scorer = worker.network or load_configured_scorer(self.scorer, worker.device)
        score = plain_scores(scorer, self.pool.config["model"])
        return nullcontext(Measuring(self, preparation(scorer), score, self.scorer.batch_size))

    def first_prompts(self, index: int) -> Sequence[str]:
        return self.prompts.get(index, ())

    @property
    def work(self) -> str:
        return f"score by {self.scorer.name}"

    def comparable(self) -> Iterator[ShardManifest]:
        store = self.folder.store
        for pool in store.list_folders("scores")[:20]:
            yield from shards_like(store, f"scores/{pool}", scorer=self.scorer.name, dtype=self.scorer.dtype)

    def probe(self) -> Probe | None:
        prompt = next((prompts[0] for prompts in self.prompts.values() if prompts), "a person")
        return probe_scoring(self.scorer, image_size(self.pool), prompt)


@dataclass
class Measuring(Computer):
    """A network that gives each image of a shard a value: `measure(images, prompts)`, images as `prepare` left them."""

    stage: ScoreStage
    prepare: Callable[[bytes], Any]
    measure: Callable[[list[Any], list[str]], list[Any]]
    batch_size: int | None

    def batches(self, index: int, tables: Sequence[pa.Table]) -> Iterator[list[Any]]:
        images = (image.as_py() for image in tables[0]["image"])
        return prepare_batches(self.prepare, images, self.batch_size)

    def compute(self, index: int, tables: Sequence[pa.Table], batches: Iterator[Any], worker: Worker,
                advance: Advance) -> ShardRows:
        (images,), values = tables, []
        prompts = read_captions(images)
        for batch in batches:
            values += self.measure(batch, prompts[len(values):len(values) + len(batch)])
            advance(len(batch))
        return ShardRows(pa.table([images["prompt_id"], images["index"], values], schema=self.stage.schema))


def read_scores(table: pa.Table) -> dict[str, dict[int, float]]:
    """Prompt id -> image index -> score, of a shard of scores; all candidates of a prompt are in one shard."""
    found: dict[str, dict[int, float]] = {}
    for prompt, index, score in zip(*(table[name].to_pylist() for name in SCHEMA.names), strict=True):
        found.setdefault(prompt, {})[index] = score
    return found
