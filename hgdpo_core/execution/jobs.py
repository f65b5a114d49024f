"""Work cut into ranges of shards, so that any process on any machine can make one: here or on a worker, the same code.

Whoever plans offers the work: beside a folder's `config.json`, which says what it holds, `means.json` says by what
means it is made (where the model lies, the batch size). A request names the folder and a range; `run_shards` reads
the rest from the store.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from hgdpo_core.config import PoolConfig, SamplerConfig, ScorerConfig
from hgdpo_core.errors import StorageError
from hgdpo_core.models import Model
from hgdpo_core.models.places import Place, find_offered_model, model_means, refuse_other_model
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.scorers import find_scorer
from hgdpo_core.stages.distances import measure_distances, missing_distances
from hgdpo_core.stages.features import embed_pool
from hgdpo_core.stages.latents import cache_latents, missing_latents
from hgdpo_core.stages.pool import PoolPlan, generate_pool, open_pool
from hgdpo_core.stages.scores import missing_scores, score_pool
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import FORMAT_VERSION, ShardFolder, ShardManifest, format_range, parse_range
from hgdpo_core.version import code_version, refuse_other_code

Stage = Literal["pool", "score", "latents", "features", "distances"]
OnShard = Callable[[ShardManifest], None]
MAX_SHARD_RUNS = 300  # a stage's shard runs; Prefect drops records in bursts of thousands
NAME_CHARACTERS = 24


class ShardRequest(BaseModel):
    """A range of shards of one folder, for `run_shards`. Survives JSON: it is the parameter of a shard flow run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: str = Field(description="the object store, as an absolute URL")
    folder: str = Field(description="key of the folder of shards, for example pools/n20-0123456789ab")
    stage: Stage = Field(description="what the folder holds: images, scores, latents, features or distances")
    shards: str = Field(pattern=r"^\d+(-\d+)?(,\d+(-\d+)?)*$", description='which shards, for example "0-6"')
    code_version: str = Field(description="the code that planned this; other code refuses to run it")
    format_version: int = Field(description="the format of the shards that were planned")

    @field_validator("root")
    @classmethod
    def _is_absolute(cls, root: str) -> str:
        if "://" not in root:
            raise ValueError(f"the root {root!r} is relative: a worker elsewhere needs a URL such as s3://bucket/x")
        return root

    @property
    def indices(self) -> list[int]:
        """The shards' indices, ascending."""
        return parse_range(self.shards)

    @property
    def folder_id(self) -> str:
        """The folder's own name; it ends in the hash of its settings."""
        return self.folder.rpartition("/")[2]

    @property
    def tag(self) -> str:
        """What every run of this range carries, whoever started it."""
        return f"shard:{self.folder_id}:{self.indices[0]}"


@dataclass(frozen=True)
class Work:
    """The wanted shards of one folder that somebody offers, and which of them are not there."""

    store: Store
    folder: ShardFolder
    stage: Stage
    title: str
    """What people know it by."""
    images_per_shard: int
    """Images that making a full shard draws or reads."""
    wanted: tuple[int, ...]
    missing: frozenset[int]
    prompts: dict[int, tuple[str, ...]]
    """Prompts of a shard, for its run's name; a stage that does not know them leaves them out."""
    find_missing: Callable[[Sequence[int]], list[int]]
    """Which of some shards are not there now."""

    def cut(self, images_per_run: int | None = None, *, least_runs: int = 1) -> list[ShardRequest]:
        """Ranges of whole shards that have something missing, each of about so many images; without a number, one.

        Ranges are cut from all wanted shards, so that a second attempt meets the ranges of the first. They are smaller
        where fewer than `least_runs` would come out, and larger where more than MAX_SHARD_RUNS would.
        """
        shards = len(self.wanted)
        size = shards if images_per_run is None else images_per_run // self.images_per_shard
        size = max(min(size, -(-shards // least_runs)), -(-shards // MAX_SHARD_RUNS), 1)
        ranges = (self.wanted[start:start + size] for start in range(0, len(self.wanted), size))
        return [ShardRequest(root=self.store.root, folder=self.folder.key, stage=self.stage,
                             shards=format_range(indices), code_version=code_version(), format_version=FORMAT_VERSION)
                for indices in ranges if self.missing.intersection(indices)]

    def name(self, request: ShardRequest) -> str:
        """For people: the title, the range, its first and its last prompt."""
        known = [prompt for index in request.indices for prompt in self.prompts.get(index, ())]
        ends = f": {_short(known[0])}" + (f" to {_short(known[-1])}" if len(known) > 1 else "") if known else ""
        return f"{self.title} {request.shards}{ends}"


# -- offering: what is wanted, what is missing, by what means


def offer_pool(plan: PoolPlan, *, title: str = "pool", share: bool = False) -> Work:
    """The images of a planned pool. With `share`, a model outside the store is copied there for the workers."""
    store = plan.folder.store
    means = {"batch_size": plan.pool.batch_size, **model_means(store, plan.model, share=share)}
    _offer(store, plan.folder.key, means)
    return Work(store, plan.folder, "pool", title, _images_per_shard(plan.folder), tuple(plan.indices),
                frozenset(shard.index for shard in plan.missing), _prompts(plan), plan.find_missing)


def offer_scores(plan: PoolPlan, scores: ShardFolder, scorer: ScorerConfig, *, title: str | None = None,
                 share: bool = False) -> Work:
    """A scorer's scores of a planned pool's shards, all of which must be there. `title`: else the scorer's name."""
    return _offer_judging(plan.folder, plan.indices, _prompts(plan), scores, scorer, "score", title or scorer.name,
                          share)


def offer_pool_scores(pool: ShardFolder, scores: ShardFolder, scorer: ScorerConfig, indices: Sequence[int], *,
                      share: bool = False) -> Work:
    """The same for shards of a pool that nobody plans any more."""
    title = f"{scorer.name}, {pool.key.rpartition('/')[2]}"
    return _offer_judging(pool, indices, {}, scores, scorer, "score", title, share)


def offer_features(plan: PoolPlan, features: ShardFolder, scorer: ScorerConfig, *, share: bool = False) -> Work:
    """Features of a planned pool's images by a scorer's image tower; all shards of the pool must be there."""
    return _offer_judging(plan.folder, plan.indices, _prompts(plan), features, scorer, "features", "features", share)


def _images_per_shard(pool: ShardFolder) -> int:
    return pool.config["images_per_prompt"] * pool.config["prompts_per_shard"]


def _prompts(plan: PoolPlan) -> dict[int, tuple[str, ...]]:
    return {shard.index: shard.prompts for shard in plan.shards}


def _offer_judging(pool: ShardFolder, indices: Sequence[int], prompts: dict[int, tuple[str, ...]], folder: ShardFolder,
                   scorer: ScorerConfig, stage: Stage, title: str, share: bool) -> Work:
    store, source = folder.store, scorer.source
    local = Path(source).expanduser() if source not in (None, "figures") else None
    place = Place.of(store, local, share=share) if local is not None and local.exists() else Place(source=source)
    _offer(store, folder.key, {"scorer": scorer.model_dump(mode="json"), "place": place.model_dump()})
    find_missing = functools.partial(missing_scores, pool, folder)
    return Work(store, folder, stage, title, _images_per_shard(pool), tuple(indices), frozenset(find_missing(indices)),
                prompts, find_missing)


def offer_latents(triplets: ShardFolder, latents: ShardFolder, model: Model, indices: Sequence[int], *,
                  share: bool = False) -> Work:
    """Latents and text embeddings of a data set's shards."""
    store = latents.store
    _offer(store, latents.key, model_means(store, model, share=share))
    find_missing = functools.partial(missing_latents, triplets, latents)
    first = triplets.find(indices[0]) if indices else None
    images = 2 * first.rows if first and first.rows else 1
    return Work(store, latents, "latents", "latents", images, tuple(indices), frozenset(find_missing(indices)), {},
                find_missing)


def offer_distances(pool: ShardFolder, scores: ShardFolder, distances: ShardFolder, model: Model,
                    indices: Sequence[int], *, share: bool = False) -> Work:
    """Latent distances within some of a pool's shards, ranked by scores that must be there."""
    store = distances.store
    _offer(store, distances.key, model_means(store, model, share=share))
    find_missing = functools.partial(missing_distances, pool, scores, distances)
    return Work(store, distances, "distances", "distances", _images_per_shard(pool), tuple(indices),
                frozenset(find_missing(indices)), {}, find_missing)


def _offer(store: Store, folder: str, means: dict[str, Any]) -> None:
    """The newest means hold: an earlier offer may name a model that lies elsewhere by now."""
    key = f"{folder}/means.json"
    if not store.exists(key) or store.read_json(key) != means:
        store.write_json(key, means)


# -- running: the store and a request are all that is needed


def run_shards(request: ShardRequest, *, progress: Progress = silent, should_stop: ShouldStop = never_stop,
               on_shard: OnShard | None = None) -> int:
    """Make what is missing of a range, commit each shard as it finishes, and return how many images or pairs that was.

    `on_shard` is called with each manifest just committed. ConfigError when this code is not the one that planned the
    range; ModelError when the model is not the one it was planned with; StoppedError after `should_stop`.
    """
    refuse_other_code(request.code_version, request.format_version)
    store = Store(request.root)
    folder = _Watched.open(store, request.folder)
    folder.on_shard = on_shard
    if not store.exists(f"{folder.key}/means.json"):
        raise StorageError(f"{store.url(folder.key)} has no means.json, which says where its model lies: start the "
                           "run that planned it again")
    means = store.read_json(f"{folder.key}/means.json")
    programs = {"pool": _draw, "score": _score, "latents": _encode, "features": _embed, "distances": _measure}
    program = programs[request.stage]
    return program(folder, means, request.indices, progress, should_stop)


class _Watched(ShardFolder):
    """A folder that tells of each shard it commits."""

    on_shard: OnShard | None = None

    def commit(self, *args: Any, **settings: Any) -> ShardManifest:
        manifest = super().commit(*args, **settings)
        if self.on_shard is not None:
            self.on_shard(manifest)
        return manifest


def _draw(folder: ShardFolder, means: dict[str, Any], indices: list[int], progress: Progress,
          should_stop: ShouldStop) -> int:
    config = folder.config
    names = ("images_per_prompt", "seed", "image_format", "prompts_per_shard")
    pool = PoolConfig(batch_size=means["batch_size"], **{name: config[name] for name in names})
    model = find_offered_model(folder.store, config["model"], means)
    plan = open_pool(folder, model, SamplerConfig.model_validate(config["sampler"]), pool, indices)
    return generate_pool(plan, progress=progress, should_stop=should_stop)


def _score(folder: ShardFolder, means: dict[str, Any], indices: list[int], progress: Progress,
           should_stop: ShouldStop) -> int:
    scorer, pool = _find_judging(folder, means)
    return score_pool(folder.store, pool, folder, scorer, indices, progress=progress, should_stop=should_stop)


def _embed(folder: ShardFolder, means: dict[str, Any], indices: list[int], progress: Progress,
           should_stop: ShouldStop) -> int:
    scorer, pool = _find_judging(folder, means)
    return embed_pool(pool, folder, scorer, missing_scores(pool, folder, indices), progress=progress,
                      should_stop=should_stop)


def _find_judging(folder: ShardFolder, means: dict[str, Any]) -> tuple[ScorerConfig, ShardFolder]:
    """The scorer of a folder at its offered place, and the pool that it judges."""
    scorer = ScorerConfig.model_validate(means["scorer"])
    place = Place.model_validate(means["place"])
    if place != Place():
        scorer = scorer.model_copy(update={"source": place.locate(folder.store)})
    refuse_other_model(f"scorer {scorer.name}", find_scorer(scorer.name, scorer.source), folder.config["fingerprint"])
    return scorer, ShardFolder.open(folder.store, f"pools/{folder.config['pool_id']}")


def _measure(folder: ShardFolder, means: dict[str, Any], indices: list[int], progress: Progress,
             should_stop: ShouldStop) -> int:
    pool, scores = (ShardFolder.open(folder.store, folder.config[name]) for name in ("pool", "scores"))
    model = find_offered_model(folder.store, folder.config["model"], means)
    return measure_distances(pool, scores, folder, model, missing_distances(pool, scores, folder, indices),
                             progress=progress, should_stop=should_stop)


def _encode(folder: ShardFolder, means: dict[str, Any], indices: list[int], progress: Progress,
            should_stop: ShouldStop) -> int:
    triplets = ShardFolder.open(folder.store, folder.config["triplets"])
    model = find_offered_model(folder.store, folder.config, means)
    return cache_latents(triplets, folder, model, indices, progress=progress, should_stop=should_stop)


# -- ranges as people write them


def _short(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= NAME_CHARACTERS else line[:NAME_CHARACTERS - 1].rstrip() + "…"
