"""Pool generation: N candidates a prompt (arXiv:2405.20216v1, Eq. 4), shard by shard.

An evaluation's images are a pool too: of another model, with fewer images a prompt.
"""

import functools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import pyarrow as pa
import torch

from hgdpo_core.config import PoolConfig, SamplerConfig, content_hash, identity
from hgdpo_core.errors import ConfigError, StorageError
from hgdpo_core.models import Model, default_device, device_name
from hgdpo_core.models.image_generator import ImageGenerator, chunks
from hgdpo_core.parallel import Writer
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.prompts import prompt_id
from hgdpo_core.storage import Store
from hgdpo_core.storage.shards import ShardFolder, ShardManifest, read_table, write_table

logger = logging.getLogger(__name__)

T = TypeVar("T")

FORMAT_VERSION = 1  # raise when the same settings would give other images
SCHEMA = pa.schema([
    ("prompt_id", pa.string()), ("prompt", pa.string()), ("index", pa.int32()), ("seed", pa.int64()),
    ("image", pa.binary()), ("width", pa.int32()), ("height", pa.int32()),
])
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
class PoolPlan:
    """Where a pool lies, how it is drawn, its shards that hold the wanted prompts, and which of them are missing."""

    pool_id: str
    folder: ShardFolder
    model: Model
    sampler: SamplerConfig
    pool: PoolConfig
    shards: tuple[PlannedShard, ...]
    missing: tuple[PlannedShard, ...]
    found: Mapping[int, ShardManifest] = field(default_factory=dict, repr=False)
    """Manifests of the planned shards that are there, where `plan_pool` planned them."""

    @property
    def indices(self) -> list[int]:
        return [shard.index for shard in self.shards]

    @property
    def images(self) -> int:
        """Images of all planned shards."""
        return self.pool.images_per_prompt * sum(len(shard.prompts) for shard in self.shards)

    @property
    def missing_images(self) -> int:
        return self.pool.images_per_prompt * sum(len(shard.prompts) for shard in self.missing)

    def find_missing(self, indices: Sequence[int]) -> list[int]:
        """Which of some planned shards are not there now."""
        manifests, shards = self.folder.manifests(indices), {shard.index: shard for shard in self.shards}
        return [index for index in indices if not _holds(manifests.get(index), shards[index])]


def pool_settings(model: Model, sampler: SamplerConfig, pool: PoolConfig) -> dict:
    """All that decides a pool's images, and nothing else: not the prompts, the batch or the device."""
    return {"stage": "pool", "format_version": FORMAT_VERSION, "model": model.identity(),
            "sampler": identity(sampler, later={"latent_normalisation"}),
            "images_per_prompt": pool.images_per_prompt,
            "seed": pool.seed, "image_format": pool.image_format, "prompts_per_shard": pool.prompts_per_shard}


def plan_pool(store: Store, model: Model, sampler: SamplerConfig, pool: PoolConfig,
              prompts: Sequence[str]) -> PoolPlan:
    """Assign every prompt to a shard, keeping earlier assignments: a list that grows finds its finished prompts.

    ConfigError when latent normalisation is asked of a model without a LoRA.
    """
    if sampler.latent_normalisation and model.lora is None:
        raise ConfigError("sampler.latent_normalisation is on, but the model wears no LoRA: only a tuned model has a "
                          "reference to take channel statistics from; sample this one without it")
    settings = pool_settings(model, sampler, pool)
    pool_id = f"n{pool.images_per_prompt}-{content_hash(settings)}"
    key = f"pools/{pool_id}"
    planned, manifests = _read_plan(store, key), ShardFolder(store, key, settings).manifests()
    # Two runs may have planned one index at the same moment: the committed shard holds, other prompts move on.
    assigned = {i: shard for i, shard in planned.items() if i not in manifests or _holds(manifests[i], shard)}
    known = {prompt: shard.index for shard in assigned.values() for prompt in shard.prompts}
    new = list(dict.fromkeys(prompt for prompt in prompts if prompt not in known))
    first = max([*planned, *manifests], default=-1) + 1
    added = [PlannedShard(first + i, tuple(chunk)) for i, chunk in enumerate(chunks(new, pool.prompts_per_shard))]
    assigned |= {shard.index: shard for shard in added}
    known |= {prompt: shard.index for shard in added for prompt in shard.prompts}
    expected = {"shards": len(assigned), "rows": len(known) * pool.images_per_prompt}
    folder = ShardFolder.create(store, key, settings | {"expected": expected})
    if added:
        _write_plan(store, key, added)
    wanted = sorted({known[prompt] for prompt in prompts})
    shards = tuple(assigned[index] for index in wanted)
    missing = tuple(shard for shard in shards if not _holds(manifests.get(shard.index), shard))
    found = {index: manifests[index] for index in set(wanted) - {shard.index for shard in missing}}
    return PoolPlan(pool_id, folder, model, sampler, pool, shards, missing, found)


def open_pool(folder: ShardFolder, model: Model, sampler: SamplerConfig, pool: PoolConfig,
              indices: Sequence[int]) -> PoolPlan:
    """Some shards of a pool as an earlier `plan_pool` planned them; StorageError for one that it did not plan."""
    planned, manifests = _read_plan(folder.store, folder.key), folder.manifests(indices)
    unknown = [index for index in indices if index not in planned]
    if unknown:
        raise StorageError(f"{folder.store.url(folder.key)}/plan names no prompts for shard {unknown[0]}: start the "
                           "run that planned it again")
    shards = tuple(planned[index] for index in indices)
    missing = tuple(shard for shard in shards if not _holds(manifests.get(shard.index), shard))
    return PoolPlan(folder.key.rpartition("/")[2], folder, model, sampler, pool, shards, missing)


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
        for index, prompt in zip(table["shard"].to_pylist(), table["prompt"].to_pylist(), strict=True):
            grouped.setdefault(index, []).append(prompt)
        for index, prompts in grouped.items():
            shards.setdefault(index, PlannedShard(index, tuple(prompts)))
    return shards


def _write_plan(store: Store, key: str, shards: Sequence[PlannedShard]) -> None:
    rows = [(shard.index, prompt) for shard in shards for prompt in shard.prompts]
    table = pa.table({"shard": [index for index, _ in rows], "prompt_id": [prompt_id(p) for _, p in rows],
                      "prompt": [p for _, p in rows]}, schema=PLAN_SCHEMA)
    name = f"{shards[0].index:05d}-{content_hash(rows)}.parquet"
    write_table(store, f"{key}/plan/{name}", table)


def generate_pool(plan: PoolPlan, *, device: str | None = None, generator: ImageGenerator | None = None,
                  progress: Progress = silent, should_stop: ShouldStop = never_stop) -> int:
    """Make the plan's missing shards and commit each as it finishes; returns the number of images made.

    `generator`: the plan's model, already loaded. Without one it loads here, and only if something is missing.
    A shard is written while the next is drawn. Stopping loses at most the shard being drawn, dying also the one being
    written. Where a batch does not fit into memory, its shard starts again with half of it; ConfigError at one image.
    """
    if not plan.missing:
        return 0
    generator = generator or ImageGenerator(plan.model, plan.sampler, plan.pool, device or default_device())
    total, done, batch_size = plan.missing_images, 0, plan.pool.batch_size
    with Writer() as writer:
        for shard in plan.missing:
            if _holds(plan.folder.find(shard.index), shard):  # another worker was faster
                done += len(shard.prompts) * plan.pool.images_per_prompt
                progress(done, total, "images")
                continue
            start, rows = time.monotonic(), None
            while rows is None:
                rows = _draw_shard(generator, shard, done, total, progress, should_stop)
                if rows is None:
                    batch_size = generator.halve_batch()
            done += len(rows)
            writer.start(functools.partial(_commit_shard, plan, shard, rows, device=device_name(generator.device),
                                           batch_size=batch_size, seconds=time.monotonic() - start))
    return done


def _draw_shard(generator: ImageGenerator, shard: PlannedShard, before: int, total: int, progress: Progress,
                should_stop: ShouldStop) -> list[dict] | None:
    """The shard's rows; None when a batch does not fit into memory."""
    rows = []
    try:
        for row in generator.generate(shard.prompts, should_stop):
            rows.append(row)
            progress(before + len(rows), total, "images")
    except torch.OutOfMemoryError:
        return None  # and not handled here: the error holds on to the tensors it met
    return rows


def _commit_shard(plan: PoolPlan, shard: PlannedShard, rows: Sequence[dict], *, device: str, batch_size: int,
                  seconds: float) -> None:
    manifest = plan.folder.commit(
        shard.index, pa.Table.from_pylist(list(rows), schema=SCHEMA), device=device, batch_size=batch_size,
        seconds=seconds, details={"prompt_ids": shard.prompt_ids})
    if not _holds(manifest, shard):
        raise StorageError(f"shard {shard.index} of {plan.folder.key} was taken at the same moment by a run with "
                           "other prompts: start this run again, it will plan around it")
