"""Plan before spending: what a run would make, what it would find, how long that takes and how large it gets.

The plan takes the road of `flows/full.py` on a store that writes nothing. Behind a training that is not finished no id
is known: there it counts what will be made, and cannot tell what will be found.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from hgdpo_core.config import DpoConfig, ScorerConfig, SftConfig, TrainingConfig
from hgdpo_core.errors import StorageError
from hgdpo_core.evaluate import plan_evaluation
from hgdpo_core.models import Model, default_device, device_name
from hgdpo_core.models.published import fetch_model, find_record
from hgdpo_core.plan import probe, rates
from hgdpo_core.plan.rates import Rate
from hgdpo_core.plan.table import RunPlan, StagePlan
from hgdpo_core.run import Run
from hgdpo_core.stages.distances import distance_folder, first_shards
from hgdpo_core.stages.image_latents import image_latent_folder
from hgdpo_core.stages.latents import latent_folder
from hgdpo_core.stages.pool import PoolPlan, plan_pool, pool_settings
from hgdpo_core.stages.scores import score_folder
from hgdpo_core.stages.triplets import triplet_folder
from hgdpo_core.storage import DryStore, Store
from hgdpo_core.storage.shards import InputShard, ShardFolder, ShardManifest
from hgdpo_core.training.tune import tuned_id

MAX_FOLDERS, MAX_SHARDS = 20, 8  # looked at for what past work took, where a stage's own folder tells nothing


def plan_run(run: Run, *, with_probe: bool = False) -> RunPlan:
    """The plan of an opened run; writes nothing.

    `with_probe`: every stage that misses something has its model loaded and a batch timed on this machine's device.
    Without, past shards and trainings of the root tell how long theirs took; where there are none, nobody knows.
    """
    planner = _Planner(run, with_probe)
    planner.take_the_road()
    notes = []
    if any(stage.seconds for stage in planner.stages):
        notes.append("times are estimates for one device of the kind they were measured on; loading models and waiting "
                     "for the store come on top")
    if any(stage.seconds is None for stage in planner.stages):
        notes.append("a time is not known (?) where the root holds no such work yet: --probe (in a flow: probe) times "
                     "a batch of each stage on this machine, and loads the models for it")
    if planner.assumed_image_bytes:
        notes.append(f"bytes of images are assumed, {rates.BYTES_PER_PIXEL[run.config.pool.image_format]} a pixel in "
                     f"{run.config.pool.image_format}")
    return RunPlan(run_id=run.run_id, root=run.store.root, device=planner.device_name, stages=tuple(planner.stages),
                   notes=tuple(notes))


# -- the road


@dataclass(frozen=True)
class _Shards:
    """The wanted shards of a stage: units by index, and the manifests of those that are there.

    `folder` is None where an unfinished stage before decides its id.
    """

    folder: ShardFolder | None
    units: Mapping[int, int]
    found: Mapping[int, ShardManifest]

    @property
    def complete(self) -> bool:
        return self.folder is not None and len(self.found) == len(self.units)

    def source(self, index: int) -> InputShard | None:
        """What a stage that reads this shard records; None when it is not there."""
        if self.folder is None or index not in self.found:
            return None
        return self.folder.input_shard(index, manifest=self.found[index])

    def behind(self, folder: ShardFolder | None, units: Mapping[int, int], *others: "_Shards") -> "_Shards":
        """The shards of `folder`, each made from this one and those `others` of the same index."""
        manifests = {} if folder is None else folder.manifests(units)
        found = {index: manifest for index, manifest in manifests.items()
                 if manifest.inputs == tuple(shards.source(index) for shards in (self, *others))}
        return _Shards(folder, units, found)


class _Planner:
    """One plan in the making: a row a stage in `stages`."""

    def __init__(self, run: Run, with_probe: bool):
        self.run, self.config, self.with_probe = run, run.config, with_probe
        self.store: Store = DryStore(run.store.root)
        self.device = default_device()
        self.device_name = device_name(self.device)
        self.size = (run.config.sampler.width, run.config.sampler.height)
        self.model = rates.model_size(run.target.path)
        self.prompt = run.prompts.prompts[0]        # for probes
        self.stages: list[StagePlan] = []
        self.assumed_image_bytes = False
        self._rates: dict[str, Rate | None] = {}
        self._drawn: probe.Drawing | None = None

    def take_the_road(self) -> None:
        config, prompts = self.config, self.run.prompts.prompts
        target = self._sft()
        pool = self._pool("pool", prompts, config.pool.images_per_prompt, "sft", target and plan_pool(
            self.store, target, config.sampler.plain, config.pool, prompts))
        scores = self._scores("score", pool, config.scorer, "sft")
        triplets = self._triplets(pool, scores)
        latents = self._latents(triplets, target)
        tuned = self._dpo(latents, target)
        self._distances(pool, scores, target)

        prompts, images = self.run.evaluation_prompts.prompts, config.evaluation.images_per_prompt
        for who, model, waits_for in (("target", target, "sft"), ("tuned", tuned, "dpo")):
            drawn = self._pool(f"evaluation images, {who}", prompts, images, waits_for, model and plan_evaluation(
                self.store, model, config.sampler, config.pool, config.evaluation, prompts),
                twice=who == "tuned" and config.sampler.latent_normalisation)
            for scorer in config.evaluation.scorers:
                self._scores(f"{scorer.name}, {who}", drawn, scorer, waits_for)

    # -- the stages: each adds its row and returns what the next ones need, a model or None while it is unfinished

    def _sft(self) -> Model | None:
        target, images, config = self.run.target, self.run.images, self.config.sft
        if images is None:
            return target
        folder = image_latent_folder(self.store, images, target, self.size, flips=config.flip)
        units = {index: len(images.shard(index)) for index in images.shards}
        latents = _Shards(folder, units, folder.manifests(units))
        self._add("sft latents", "images", latents, lambda: self.model.latent_bytes(self.size, 2 if config.flip else 1),
                  self._both_ways if config.flip else self._encoding, "")
        usable = sum(manifest.rows for manifest in latents.found.values()) if latents.complete else sum(units.values())
        size = rates.FLOAT_BYTES * (self.model.unet + self.model.vae + self.model.text_encoder)
        model_id = self._training("sft", latents, target, usable, config, size, self.model.unet)
        record = find_record(self.store, model_id) if model_id else None
        if record is None:
            return None
        path = self.store.local_path(f"models/{model_id}") or target.path   # only its size and speed matter here
        return replace(target, path=path, fingerprint=record["fingerprint"], vae=None, configs=None)

    def _pool(self, stage: str, prompts: Sequence[str], images: int, waits_for: str, plan: PoolPlan | None, *,
              twice: bool = False) -> _Shards:
        if plan is None:
            size = self.config.pool.prompts_per_shard
            units = {index: images * len(prompts[start:start + size])
                     for index, start in enumerate(range(0, len(prompts), size))}
            shards = _Shards(None, units, {})
        else:
            units = {shard.index: images * len(shard.prompts) for shard in plan.shards}
            shards = _Shards(plan.folder, units, plan.found)
        self._add(stage, "images", shards, self._image_bytes, lambda own: self._drawing(own, twice), waits_for)
        return shards

    def _scores(self, stage: str, pool: _Shards, scorer: ScorerConfig, waits_for: str) -> _Shards:
        folder = score_folder(self.store, _name(pool.folder), scorer) if pool.folder else None
        scores = pool.behind(folder, pool.units)
        self._add(stage, "images", scores, lambda: rates.SCORE_BYTES, lambda own: self._judging(scorer, own), waits_for)
        return scores

    def _triplets(self, pool: _Shards, scores: _Shards) -> _Shards:
        folder = None
        if pool.folder and scores.folder:
            folder = triplet_folder(self.store, pool.folder, scores.folder, self.run.prompts.id, self.config.triplets)
        prompts = {index: images // self.config.pool.images_per_prompt for index, images in pool.units.items()}
        triplets = pool.behind(folder, prompts, scores)
        self._add("triplets", "prompts", triplets, lambda: 2 * self._image_bytes() + rates.TRIPLET_BYTES, self._ranking,
                  "sft")
        return triplets

    def _latents(self, triplets: _Shards, target: Model | None) -> _Shards:
        flips, folder = self.config.dpo.flip, None
        if triplets.folder and target:
            folder = latent_folder(self.store, triplets.folder, target, self.size, flips=flips)
        pairs = {index: triplets.found[index].rows if index in triplets.found else prompts
                 for index, prompts in triplets.units.items()}
        latents = triplets.behind(folder, pairs)
        self._add("latents", "pairs", latents, lambda: self.model.latent_bytes(self.size, 4 if flips else 2),
                  self._pair_encoding, "sft")
        return latents

    def _distances(self, pool: _Shards, scores: _Shards, target: Model | None) -> None:
        candidates = self.config.pool.images_per_prompt
        measured = first_shards({index: images // candidates for index, images in pool.units.items()})
        units = {index: pool.units[index] * (candidates - 1) // candidates for index in measured}
        folder = None
        if pool.folder and scores.folder and target:
            folder = distance_folder(pool.folder, scores.folder, target)
        self._add("latent distances", "images", pool.behind(folder, units, scores), lambda: rates.DISTANCE_BYTES,
                  self._encoding, "sft")

    def _dpo(self, latents: _Shards, target: Model | None) -> Model | None:
        config, pairs = self.config.dpo, sum(latents.units.values())
        trained = config.lora_rank * self.model.attention
        model_id = self._training("dpo", latents, target, pairs, config, rates.FLOAT_BYTES * trained, trained)
        path = fetch_model(self.store, model_id) if model_id else None
        if path is None or target is None:
            return None
        return target.with_lora(path, self.config.evaluation.lora_weight)

    def _training(self, kind: Literal["sft", "dpo"], latents: _Shards, model: Model | None, samples: int,
                  config: SftConfig | DpoConfig, size: float, trained: int) -> str | None:
        """Add the row of a training of `trained` numbers; its model's id once all its latents are there."""
        steps = config.max_steps or math.ceil(config.epochs * samples / _batch(config))
        model_id, found = None, None
        if latents.complete and latents.folder and model:
            model_id = tuned_id(kind, model.identity(), latents.folder, sorted(latents.units), config,
                                latents.found)
            found = find_record(self.store, model_id)
        checkpoints = rates.CHECKPOINTS * rates.FLOAT_BYTES * rates.OPTIMIZER_FLOATS * trained
        rate = Rate(0.0, "") if found else self._training_step(kind, config)
        seconds, basis = (steps * rate.seconds, rate.basis) if rate else (None, "")
        self.stages.append(StagePlan(
            stage=kind, unit="steps", total=steps, missing=0 if found else steps, shards=0, missing_shards=0,
            bytes_found=sum(count for _, count, _ in self.store.walk(f"models/{model_id}")) if found else 0,
            bytes_missing=0 if found else round(size + checkpoints),
            seconds=seconds, basis=basis,
            folder=f"models/{model_id}" if model_id else ""))
        return model_id

    def _add(self, stage: str, unit: str, shards: _Shards, row_bytes: Callable[[], float],
             rate: Callable[..., Rate | None], waits_for: str) -> None:
        """Add the row of a stage of shards; `row_bytes` is asked where none of them tells."""
        found, missing = shards.found.values(), shards.units.keys() - shards.found.keys()
        units = sum(shards.units[index] for index in missing)
        bytes_found, rows = sum(manifest.bytes for manifest in found), sum(manifest.rows for manifest in found)
        known = rate(found) if missing else Rate(0.0, "")   # before the bytes: a probe tells both
        bytes_missing = units * bytes_found / rows if rows else (
            units * row_bytes() + len(missing) * rates.SHARD_BYTES if missing else 0)
        seconds, basis = (units * known.seconds, known.basis) if known else (None, "")
        self.stages.append(StagePlan(
            stage=stage, unit=unit, total=sum(shards.units.values()), missing=units, shards=len(shards.units),
            missing_shards=len(missing), bytes_found=bytes_found, bytes_missing=round(bytes_missing),
            seconds=seconds, basis=basis, folder=shards.folder.key if shards.folder else "",
            note="" if shards.folder else _unknown(waits_for)))

    # -- rates: one for each kind of work, from a probe or from shards that are there

    def _rate(self, kind: str, own: Iterable[ShardManifest], elsewhere: Callable[[], Iterable[ShardManifest]],
              timed: Callable[[], float]) -> Rate | None:
        if kind not in self._rates:
            if self.with_probe:
                self._rates[kind] = Rate(timed(), f"a batch timed on {self.device_name}")
            else:
                self._rates[kind] = (rates.measured(own, self.device_name)
                                     or rates.measured(elsewhere(), self.device_name))
        return self._rates[kind]

    def _drawing(self, own: Iterable[ShardManifest], twice: bool = False) -> Rate | None:
        """`twice`: by two models side by side, for latent normalisation."""
        if twice:
            once = self._drawing(())
            return rates.measured(own, self.device_name) or (once and once._replace(seconds=2 * once.seconds))
        sampler, pool = self.config.sampler.plain, self.config.pool
        alike = pool_settings(self.run.target, sampler, pool)["sampler"]

        def timed() -> float:
            self._drawn = probe.draw(self.run.target, sampler, pool, self.prompt)
            return self._drawn.seconds

        return self._rate("draw", own, lambda: self._elsewhere("pools", sampler=alike), timed)

    def _judging(self, scorer: ScorerConfig, own: Iterable[ShardManifest]) -> Rate | None:
        return self._rate(f"score by {scorer.name}", own,
                          lambda: (manifest for pool in self.store.list_folders("scores")[:MAX_FOLDERS]
                                   for manifest in self._elsewhere(f"scores/{pool}", scorer=scorer.name,
                                                                   dtype=scorer.dtype)),
                          lambda: probe.score_seconds(scorer, self.size, self.prompt))

    def _encoding(self, own: Iterable[ShardManifest]) -> Rate | None:
        return self._rate("encode", own, list, lambda: probe.encode_seconds(self.run.target, self.size))

    def _both_ways(self, own: Iterable[ShardManifest]) -> Rate | None:
        return self._rate("encode flips", own, list, lambda: 2 * probe.encode_seconds(self.run.target, self.size))

    def _pair_encoding(self, own: Iterable[ShardManifest]) -> Rate | None:
        images = 4 if self.config.dpo.flip else 2
        return self._rate("encode pairs", own, list, lambda: images * probe.encode_seconds(self.run.target, self.size))

    def _ranking(self, own: Iterable[ShardManifest]) -> Rate:
        return (rates.measured(own, self.device_name)
                or rates.measured(self._elsewhere("triplets"), self.device_name) or Rate(0.0, "no model works here"))

    def _training_step(self, kind: Literal["sft", "dpo"], config: SftConfig | DpoConfig) -> Rate | None:
        if self.with_probe:
            return Rate(probe.step_seconds(self.run.target, config, self.size), f"steps timed on {self.device_name}")
        return self._past_training(kind, config)

    def _elsewhere(self, parent: str, **same: Any) -> Iterator[ShardManifest]:
        """A few shards of each folder in `parent` whose config holds these values."""
        for name in self.store.list_folders(parent)[:MAX_FOLDERS]:
            with contextlib.suppress(StorageError):     # a folder that cannot be read tells nothing
                folder = ShardFolder.open(self.store, f"{parent}/{name}")
                if all(folder.config.get(key) == value for key, value in same.items()):
                    yield from folder.manifests(range(MAX_SHARDS)).values()

    def _past_training(self, kind: str, config: TrainingConfig) -> Rate | None:
        """Of a model in the store whose training had the same batch and image size."""
        same = {"batch_size", "gradient_accumulation_steps", "gradient_checkpointing"}
        for model_id in self.store.list_folders("models"):
            with contextlib.suppress(StorageError, KeyError):
                record = find_record(self.store, model_id) if model_id.startswith(f"{kind}-") else None
                if record is None or not record["steps"]:
                    continue
                made = self.store.read_json(f"models/{model_id}/config.json")
                latents = ShardFolder.open(self.store, made["latents"]).config
                if ((latents["width"], latents["height"]) == self.size
                        and all(made["config"][name] == getattr(config, name) for name in same)):
                    seconds = record["seconds"] / record["steps"]
                    return Rate(seconds, f"the training of {model_id} on {record['device']}")
        return None

    def _image_bytes(self) -> float:
        """As a probe drew one, else assumed."""
        if self._drawn is not None and self._drawn.bytes is not None:
            return self._drawn.bytes
        self.assumed_image_bytes = True
        return self.size[0] * self.size[1] * rates.BYTES_PER_PIXEL[self.config.pool.image_format]


def _batch(config: TrainingConfig) -> int:
    """Samples an optimizer step, of one process."""
    return config.batch_size * config.gradient_accumulation_steps


def _name(folder: ShardFolder) -> str:
    return folder.key.rpartition("/")[2]


def _unknown(waits_for: str) -> str:
    return f"{waits_for} is not finished and decides the ids behind it: what will be found there (?) is not known yet"
