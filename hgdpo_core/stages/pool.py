"""Pool generation: N candidates per prompt (arXiv:2405.20216v1, Eq. 4), shard by shard.

An evaluation's images are a pool too: of another model, with fewer images per prompt.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from hgdpo_core.config import PoolConfig, SamplerConfig, ScorerConfig
from hgdpo_core.config.base import content_hash
from hgdpo_core.errors import ConfigError, StorageError
from hgdpo_core.models import Model
from hgdpo_core.models.image_generator import ImageGenerator, chunks
from hgdpo_core.models.locations import find_located_model, model_locations
from hgdpo_core.models.racing import Ended, Score, race
from hgdpo_core.models.sizes import ModelSize
from hgdpo_core.prompts import as_sample, caption_of, concept_of, prompt_id
from hgdpo_core.prompts.concepts import load_concept
from hgdpo_core.prompts.samples import sample_key
from hgdpo_core.scorers import find_scorer, load_configured_scorer
from hgdpo_core.stages.base import Advance, Computer, Probe, ShardRows, Stage, Worker, shards_like
from hgdpo_core.stages.located_scorer import find_located_scorer, locate_scorer, plain_scores, scorer_version
from hgdpo_core.stages.probes import probe_generation, probe_race
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ENDED, ShardFolder, ShardManifest, read_table, write_table

FORMAT_VERSION = 1  # raise when the same settings would give other images
SCHEMA = pa.schema([
    ("prompt_id", pa.string()), ("prompt", pa.string()), ("index", pa.int32()), ("seed", pa.int64()),
    ("image", pa.binary()), ("width", pa.int32()), ("height", pa.int32()),
])
ENDED_SCHEMA = pa.schema([
    ("prompt_id", pa.string()), ("prompt", pa.string()), ("index", pa.int32()), ("seed", pa.int64()),
    ("step", pa.int32()), ("score", pa.float32()), ("reason", pa.string()),
])
CONCEPT, CAPTION = pa.field("concept", pa.string()), pa.field("caption", pa.string())
"""Further columns of tables of samples with concepts; a caption is what scorers read where that is not the prompt."""
PLAN_SCHEMA = pa.schema([("shard", pa.int32()), ("prompt_id", pa.string()), ("prompt", pa.string())])


@dataclass(frozen=True)
class PlannedShard:
    """One unit of commit: which prompts it holds."""

    index: int
    prompts: tuple[str, ...]

    @property
    def prompt_ids(self) -> list[str]:
        return [prompt_id(prompt) for prompt in self.prompts]


@dataclass(frozen=True)
class PoolPlan(Stage):
    """The folder of a pool, how it is generated, its shards that hold the requested prompts, and which are missing."""

    name, doing = "pool", "generating images"
    images_per_run, least_runs = "draw_images_per_run", "least_draw_runs"
    is_costly = True

    pool_id: str
    folder: ShardFolder
    model: Model
    sampler: SamplerConfig
    pool: PoolConfig
    shards: tuple[PlannedShard, ...]
    missing: tuple[PlannedShard, ...]
    title: str = "pool"
    scorer: ScorerConfig | None = None
    """Of a raced pool: what scores the predicted images."""

    @property
    def indices(self) -> list[int]:
        return [shard.index for shard in self.shards]

    @property
    def images(self) -> int:
        """Candidates of all planned shards."""
        return self.pool.images_per_prompt * sum(len(shard.prompts) for shard in self.shards)

    @property
    def missing_images(self) -> int:
        return self.pool.images_per_prompt * sum(len(shard.prompts) for shard in self.missing)

    @property
    def concept_ids(self) -> list[str]:
        """The people of the planned samples, each once."""
        found = (concept_of(prompt) for shard in self.shards for prompt in shard.prompts)
        return list(dict.fromkeys(concept for concept in found if concept is not None))

    def titled(self, title: str) -> "PoolPlan":
        """The same with another title."""
        return replace(self, title=title)

    @functools.cached_property
    def _by_index(self) -> dict[int, PlannedShard]:
        return {shard.index: shard for shard in self.shards}

    def is_requested(self, index: int, manifest: ShardManifest | None) -> bool:
        return _holds(manifest, self._by_index[index])

    def units(self, indices: Iterable[int], sources: Sequence[Mapping[int, ShardManifest]] = ()) -> dict[int, int]:
        return {index: self.pool.images_per_prompt * len(self._by_index[index].prompts) for index in indices}

    def expected_rows(self, indices: Iterable[int]) -> dict[int, int]:
        """Rows of each shard, for the stages that read them."""
        return {index: self.pool.images_kept * len(self._by_index[index].prompts) for index in indices}

    def recipe(self, *, copy_to_store: bool = False) -> dict[str, Any]:
        locations = model_locations(self.folder.store, self.model, copy_to_store=copy_to_store)
        raced = {} if self.scorer is None else {
            "race_scorer": locate_scorer(self.folder.store, self.scorer, copy_to_store=copy_to_store)}
        return {"batch_size": self.pool.batch_size, **locations, **raced}

    @classmethod
    def open(cls, folder: ShardFolder, recipe: Mapping[str, Any], indices: Sequence[int]) -> "PoolPlan":
        config, planned = folder.config, _read_plan(folder.store, folder.key)
        pool = PoolConfig.from_identity(config, batch_size=recipe["batch_size"])
        model = find_located_model(folder.store, config["model"], recipe)
        unknown = [index for index in indices if index not in planned]
        if unknown:
            raise StorageError(f"{folder.store.url(folder.key)}/plan names no prompts for shard {unknown[0]}: start "
                               "the run that planned it again")
        scorer = find_located_scorer(folder.store, recipe["race_scorer"], config["race_scorer"]["fingerprint"]
                                     ) if pool.race else None
        return _planned(folder, model, SamplerConfig.model_validate(config["sampler"]), pool,
                        [planned[index] for index in indices], folder.manifests(indices), scorer)

    def load(self, worker: Worker) -> AbstractContextManager[Computer]:
        generator = worker.network or ImageGenerator(self.model, self.sampler, self.pool, worker.device)
        if self.model.personaliser is not None:
            generator.learn(load_concept(self.folder.store, concept) for concept in self.concept_ids)
        score = None if self.scorer is None else plain_scores(load_configured_scorer(self.scorer, worker.device),
                                                              self.folder.config["model"])
        return nullcontext(_Generating(generator, self._by_index, generator.pool.batch_size, score))

    def first_prompts(self, index: int) -> Sequence[str]:
        return self._by_index[index].prompts

    @property
    def work(self) -> str:
        raced = "raced " if self.pool.race else ""  # evaluations are not, and may take other steps
        return f"{raced}{self.name} in {self.sampler.steps} steps"

    @property
    def images_per_unit(self) -> int:
        return 2 if self.sampler.latent_normalisation else 1  # two models sample together

    def comparable(self) -> Iterator[ShardManifest]:
        settings = pool_settings(self.model, self.sampler.plain, self.pool)
        raced = {name: settings.get(name) for name in ("race", *(("images_per_prompt",) if self.pool.race else ()))}
        return shards_like(self.folder.store, "pools", sampler=settings["sampler"], **raced)

    def probe(self) -> Probe:
        prompt = self.shards[0].prompts[0]
        if self.scorer is not None:
            return probe_race(self.model, self.sampler.plain, self.pool, self.scorer, prompt)
        return probe_generation(self.model, self.sampler.plain, self.pool, prompt)

    def unit_bytes(self, size: ModelSize, image_bytes: float) -> float:
        return image_bytes * self.pool.images_kept / self.pool.images_per_prompt


def images_kept(pool: ShardFolder) -> int:
    """Images that a pool holds of each prompt: all N, or of a raced one those that were finished."""
    return PoolConfig.from_identity(pool.config).images_kept


def image_size(pool: ShardFolder) -> tuple[int, int]:
    """(width, height) of a pool's images in pixels."""
    return pool.config["sampler"]["width"], pool.config["sampler"]["height"]


@dataclass
class _Generating(Computer):
    """An image generator that fills shards."""

    generator: ImageGenerator
    shards: Mapping[int, PlannedShard]
    batch_size: int | None
    score: Score | None = None
    """Of predicted images, in a raced pool."""

    def compute(self, index: int, tables: Sequence[pa.Table], batches: Iterator[Any], worker: Worker,
                advance: Advance) -> ShardRows:
        shard, rows, ended = self.shards[index], [], []
        self.generator.pool = self.generator.pool.model_copy(update={"batch_size": self.batch_size})
        made = (self.generator.generate(shard.prompts, worker.should_stop) if self.score is None else
                race(self.generator, shard.prompts, self.score, worker.should_stop))
        for candidate in made:
            (ended if isinstance(candidate, Ended) else rows).append(candidate)
            advance(1)
        again = [number for number, row in enumerate(rows) if row.get("in_float32")]  # not in the pool's precision
        details = {"prompt_ids": shard.prompt_ids} | ({"rows_decoded_in_float32": again} if again else {})
        table = pa.Table.from_pylist(rows, schema=with_concepts(SCHEMA, shard.prompts))
        if not ended:
            return ShardRows(table, details=details)
        unfinished = [{"prompt_id": prompt_id(each.prompt), **each._asdict(),
                       "reason": f"raced: after step {each.step} neither among its prompt's best nor its worst"}
                      for each in ended]
        return ShardRows(table, pa.Table.from_pylist(unfinished, schema=ENDED_SCHEMA),
                         details | {ENDED: len(unfinished)})


def pool_settings(model: Model, sampler: SamplerConfig, pool: PoolConfig) -> dict[str, Any]:
    """All that decides a pool's images, and nothing else: not the prompts, the batch or the device."""
    return {"stage": "pool", "format_version": FORMAT_VERSION, "model": model.identity(),
            "sampler": sampler.identity(), **pool.identity()}


def plan_pool(store: Store, model: Model, sampler: SamplerConfig, pool: PoolConfig, prompts: Sequence[str],
              scorer: ScorerConfig | None = None) -> PoolPlan:
    """Assign every prompt to a shard, keeping earlier assignments: a list that grows finds its finished prompts.

    `scorer` ranks the pool; a raced one is raced by it. ConfigError for latent normalisation with a model without a
    LoRA.
    """
    sampler, scorer = pool.sampler(sampler), scorer if pool.race else None
    if sampler.latent_normalisation and model.lora is None:
        raise ConfigError("sampler.latent_normalisation is on, but the model has no LoRA: only a tuned model has a "
                          "reference to take channel statistics from; sample this one without it")
    settings = pool_settings(model, sampler, pool)
    if pool.race:
        assert scorer is not None
        settings["race_scorer"] = scorer_version(scorer, find_scorer(scorer.name, scorer.source))
    key = f"pools/n{pool.images_per_prompt}-{content_hash(settings)}"
    folder = ShardFolder(store, key, settings)
    planned, manifests = _read_plan(store, key), folder.manifests()
    lost = _recover_plan(folder, {i: manifest for i, manifest in manifests.items() if i not in planned}, prompts)
    planned |= {shard.index: shard for shard in lost}
    # Two runs may have planned one index at the same moment: the committed shard holds, other prompts move on.
    assigned = {i: shard for i, shard in planned.items() if i not in manifests or _holds(manifests[i], shard)}
    known = {prompt: shard.index for shard in assigned.values() for prompt in shard.prompts}
    new = list(dict.fromkeys(prompt for prompt in prompts if prompt not in known))
    first = max([*planned, *manifests], default=-1) + 1
    added = [PlannedShard(first + i, tuple(chunk)) for i, chunk in enumerate(chunks(new, pool.prompts_per_shard))]
    assigned |= {shard.index: shard for shard in added}
    known |= {prompt: shard.index for shard in added for prompt in shard.prompts}
    expected = {"shards": len(assigned), "rows": len(known) * pool.images_kept}
    folder = ShardFolder.create(store, key, settings | {"expected": expected})
    if lost or added:
        _write_plan(store, key, [*lost, *added])
    shards = [assigned[index] for index in sorted({known[prompt] for prompt in prompts})]
    return _planned(folder, model, sampler, pool, shards, manifests, scorer)


def _planned(folder: ShardFolder, model: Model, sampler: SamplerConfig, pool: PoolConfig,
             shards: Sequence[PlannedShard], manifests: Mapping[int, ShardManifest],
             scorer: ScorerConfig | None) -> PoolPlan:
    missing = tuple(shard for shard in shards if not _holds(manifests.get(shard.index), shard))
    return PoolPlan(folder.key.rpartition("/")[2], folder, model, sampler, pool, tuple(shards), missing, scorer=scorer)


def _holds(manifest: ShardManifest | None, shard: PlannedShard) -> bool:
    return manifest is not None and manifest.details.get("prompt_ids") == shard.prompt_ids


def _read_plan(store: Store, key: str) -> dict[int, PlannedShard]:
    """Shard index -> prompts. Where two writers planned one index at the same time, the first file by name holds."""
    shards: dict[int, PlannedShard] = {}
    for name in sorted(store.list(f"{key}/plan")):
        if not name.endswith(".parquet"):
            continue
        table = read_table(store, f"{key}/plan/{name}")
        grouped: dict[int, list[str]] = {}
        for index, prompt in zip(table["shard"].to_pylist(), read_samples(table), strict=True):
            grouped.setdefault(index, []).append(prompt)
        for index, prompts in grouped.items():
            shards.setdefault(index, PlannedShard(index, tuple(prompts)))
    return shards


def _recover_plan(folder: ShardFolder, manifests: Mapping[int, ShardManifest],
                  prompts: Sequence[str]) -> list[PlannedShard]:
    """Committed shards that the plan no longer names, as far as they hold requested prompts: their rows name them all.

    A file of the plan was lost, or was damaged and deleted; without this, finished images would be generated again.
    """
    requested = {prompt_id(prompt): prompt for prompt in prompts} if manifests else {}
    shards = []
    for index, manifest in sorted(manifests.items()):
        texts, ids = requested, manifest.details.get("prompt_ids", [])
        if not texts.keys() & set(ids):
            continue
        if not texts.keys() >= set(ids):
            further = [name for name in (CONCEPT.name, CAPTION.name) if name in manifest.columns]
            columns = ["prompt_id", "prompt", *further]
            rows = folder.read_columns(index, columns, manifest=manifest)
            texts = dict(zip(rows["prompt_id"].to_pylist(), read_samples(rows), strict=True))
        shards.append(PlannedShard(index, tuple(texts[key] for key in ids)))
    return shards


def _write_plan(store: Store, key: str, shards: Sequence[PlannedShard]) -> None:
    rows = [(shard.index, prompt) for shard in shards for prompt in shard.prompts]
    schema = with_concepts(PLAN_SCHEMA, [prompt for _, prompt in rows])
    table = pa.Table.from_pylist([{"shard": index, "prompt_id": prompt_id(prompt), "prompt": prompt,
                                   "concept": concept_of(prompt), "caption": caption_of(prompt)}
                                  for index, prompt in rows], schema=schema)
    named = [(index, sample_key(prompt)) for index, prompt in rows]
    write_table(store, f"{key}/plan/{shards[0].index:05d}-{content_hash(named)}.parquet", table)


def with_concepts(schema: pa.Schema, prompts: Iterable[str]) -> pa.Schema:
    """The columns of a table of prompts, with those for concepts where some have one."""
    return schema.append(CONCEPT).append(CAPTION) if any(map(concept_of, prompts)) else schema


def read_samples(table: pa.Table) -> list[str]:
    """The prompt of each row, with its concept where the table has any."""
    prompts = table["prompt"].to_pylist()
    if CONCEPT.name not in table.column_names:
        return prompts
    columns = (table[name].to_pylist() for name in (CONCEPT.name, CAPTION.name))
    return list(map(as_sample, prompts, *columns))


def read_captions(table: pa.Table) -> list[str]:
    """What scorers read of each row: its caption where it has one, else its prompt."""
    prompts = table["prompt"].to_pylist()
    if CAPTION.name not in table.column_names:
        return prompts
    return [caption or prompt for prompt, caption in zip(prompts, table[CAPTION.name].to_pylist(), strict=True)]
