"""The plan of a run: what it would make, what exists, how long that takes and how much storage it needs.

The plan is the pipeline itself, with a runner that makes nothing on a store that writes nothing, so it cannot differ
from the run. After a training that is not finished no id is known: there the plan counts what will be made, and cannot
determine what exists.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hgdpo_core.config.base import canonical_json
from hgdpo_core.devices import default_device, device_name
from hgdpo_core.models import Lora, Model
from hgdpo_core.models.published import fetch_model, find_record
from hgdpo_core.models.sizes import model_size
from hgdpo_core.pipeline import make_all
from hgdpo_core.plan import rates
from hgdpo_core.plan.memory import estimate_memory
from hgdpo_core.plan.rates import Rate
from hgdpo_core.plan.table import RunPlan, StagePlan
from hgdpo_core.plan.training import PlannedTraining
from hgdpo_core.progress import Progress, StageProgress, silent, silent_stages
from hgdpo_core.run import Run
from hgdpo_core.stages import Stage
from hgdpo_core.stages.base import Probe
from hgdpo_core.storage import DryStore, Store
from hgdpo_core.storage.shards import ShardFolder, ShardManifest
from hgdpo_core.training.objective import find_objective
from hgdpo_core.training.request import TrainRequest
from hgdpo_core.training.tune import Tuned, tuned_id


def plan_run(run: Run, *, with_probe: bool = False) -> RunPlan:
    """The plan of an opened run; writes nothing.

    `with_probe`: for every stage with missing work the model is loaded and a batch timed on this machine's device.
    Otherwise times are those of past shards and trainings of the root; without these, no time is known.
    """
    run = replace(run, store=DryStore(run.store.root))
    runner = PlanningRunner(run, with_probe)
    make_all(run, runner)
    notes = [f"prompts: {run.prompts.describe()}; evaluation: {run.evaluation_prompts.describe()}"]
    if run.images is not None:
        notes.append(f"images for SFT: {run.images.describe()}")
    if run.pairs is not None:
        notes.append(f"trained on {run.pairs.describe()}, not on a pool: how many of them can be used, the run finds")
    if run.target.auto_dtype and run.target.dtype == "float32":
        notes.append("target.dtype is auto, which is float32 on this machine; workers with a GPU refuse that: for them "
                     "set target.dtype, to bfloat16 (before Ampere: float16)")
    if any(stage.seconds for stage in runner.stages):
        notes.append("times are estimates for one device of the kind they were measured on; loading models and waiting "
                     "for the store come on top")
    if any(stage.seconds is None for stage in runner.stages):
        notes.append("a time is not known (?) if the root holds no such work yet: --probe (in a flow: probe) loads the "
                     "models and times a batch of each stage on this machine")
    notes += [*runner.lengths, *runner.advice]
    notes += [stage.describe() for stage in estimate_memory(run.config, run.target)]
    if runner.assumed_image_bytes:
        notes.append(f"bytes of images are assumed, {rates.BYTES_PER_PIXEL[run.config.pool.image_format]} per pixel in "
                     f"{run.config.pool.image_format}")
    return RunPlan(run_id=run.run_id, root=run.store.root, device=runner.device_name, stages=tuple(runner.stages),
                   notes=tuple(notes))


@dataclass(frozen=True)
class PlannedTuning(Tuned):
    """A placeholder for a model that is not trained yet; its fingerprint is a text that no existing id contains."""

    @property
    def fingerprint(self) -> str:
        return f"not trained yet: {self.model_id}"

    def applied_to(self, model: Model, weight: float) -> Model:
        return replace(model, lora=Lora(self.path, weight, self.fingerprint))

    def as_target(self, model: Model) -> Model:
        return replace(model, fingerprint=self.fingerprint)  # its path: only its size and speed matter here


@dataclass(frozen=True, kw_only=True)
class RecordedTuning(Tuned):
    """A model of the store; a fine-tuned one is not fetched, as its record holds all that a plan needs."""

    store: Store
    fingerprint: str

    def applied_to(self, model: Model, weight: float) -> Model:
        path = fetch_model(self.store, self.model_id)
        assert path is not None  # its record is there
        return model.with_lora(path, weight)

    def as_target(self, model: Model) -> Model:
        path = self.store.local_path(f"models/{self.model_id}") or model.path
        return replace(model, path=path, fingerprint=self.fingerprint, vae=None, configs=None, prediction_type=None)


@dataclass(frozen=True)
class _Counted:
    """The units and existing shards of a planned stage."""

    units: Mapping[int, int]
    existing: Mapping[int, ShardManifest]
    folder: ShardFolder

    @property
    def complete(self) -> bool:
        return self.units.keys() == self.existing.keys()

    @property
    def samples(self) -> int:
        """Rows that a training will read; an estimate if the stage is not complete."""
        return sum(m.rows for m in self.existing.values()) if self.complete else sum(self.units.values())


class PlanningRunner:
    """A runner that makes nothing and adds a row to `stages` for each requested stage and training."""

    copy_to_store = False

    def __init__(self, run: Run, with_probe: bool):
        self.run, self.with_probe = run, with_probe
        self.device_name = device_name(default_device())
        self.size = (run.config.sampler.width, run.config.sampler.height)
        self.model = model_size(run.target.path)
        self.stages: list[StagePlan] = []
        self.lengths: list[str] = []
        """Of each DPO training, beside the length of the later paper."""
        self.assumed_image_bytes = False
        self._counted: dict[str, _Counted] = {}
        self._unknown: dict[str, str] = {}
        """Fingerprints and folders that are unknown until a training is finished -> that training."""
        self._probes: dict[str, Probe | None] = {}
        self._rates: dict[tuple[str, float], Rate] = {}

    def make(self, stages: Sequence[Stage], on: StageProgress = silent_stages) -> list[int]:
        """Add a row for each stage; returns the numbers of missing shards."""
        return [self._add(stage) for stage in stages]

    def train(self, request: TrainRequest, progress: Progress = silent) -> Tuned:
        """Add the row of a training; returns its model, or a placeholder."""
        latents, config, store = self._counted[request.latents], request.settings, self.run.store
        training = PlannedTraining(find_objective(request.kind), config, self.run.target, self.model, self.size)
        model_id = tuned_id(request.kind, request.model, latents.folder, sorted(latents.units), config,
                            latents.existing) if latents.complete else ""
        record = find_record(store, model_id) if model_id else None
        self.stages.append(training.row(store, model_id, latents.samples, record, lambda: (
            training.probed(self.device_name) if self.with_probe else training.past(store))))
        if request.kind == "dpo":
            self.lengths.append(training.describe_length(latents.samples, self.stages[-1]))
        if record is not None:
            return RecordedTuning(model_id=model_id, path=Path(), log=[], existing=True, store=store,
                                  fingerprint=record["fingerprint"])
        planned = PlannedTuning(model_id or request.kind, Path(), [], existing=False)
        self._unknown[planned.fingerprint] = request.kind
        return planned

    def _add(self, stage: Stage) -> int:
        existing, sources = self._look(stage)
        units = stage.units(stage.indices, sources)
        self._counted[stage.folder.key] = _Counted(units, existing, stage.folder)
        waits_for = self._waits_for(stage)
        missing = units.keys() - existing.keys()
        to_make, manifests = sum(units[index] for index in missing), list(existing.values())
        rate = self._rate(stage, manifests) if missing else Rate(0.0, "")   # before the bytes: a probe measures both
        bytes_found, made = sum(item.bytes for item in manifests), sum(item.units for item in manifests)
        bytes_missing = to_make * bytes_found / made if made else (
            to_make * self._unit_bytes(stage) + len(missing) * rates.SHARD_BYTES if missing else 0)
        note = f"{waits_for} is not finished and determines the ids after it: what exists there (?) is not known yet"
        self.stages.append(StagePlan(
            stage=stage.title, unit=stage.unit, total=sum(units.values()), missing=to_make, shards=len(units),
            missing_shards=len(missing), bytes_found=bytes_found, bytes_missing=round(bytes_missing),
            seconds=to_make * rate.seconds if rate else None, basis=rate.basis if rate else "",
            folder="" if waits_for else stage.folder.key, note=note if waits_for else ""))
        return len(missing)

    def _look(self, stage: Stage) -> tuple[dict[int, ShardManifest], list[dict[int, ShardManifest]]]:
        """As `Stage.look`, but shards made from a missing shard are missing too: the run will make that one again."""
        existing, sources = stage.look()
        kept = []
        for folder, manifests in zip(stage.sources, sources, strict=True):
            counted = self._counted.get(folder.key)
            kept.append(manifests if counted is None else
                        {index: manifest for index, manifest in manifests.items() if index in counted.existing})
        return {index: manifest for index, manifest in existing.items() if all(index in found for found in kept)}, kept

    def _waits_for(self, stage: Stage) -> str:
        """The unfinished training that determines the stage's id; "" for none."""
        config = canonical_json(stage.folder.config)
        waits_for = next((kind for text, kind in self._unknown.items() if text in config), "")
        if waits_for:
            self._unknown[stage.folder.key.rpartition("/")[2]] = waits_for  # ids made from it are unknown too
        return waits_for

    def _unit_bytes(self, stage: Stage) -> float:
        probed = next((probe.bytes for probe in self._probes.values() if probe and probe.bytes), None)
        assumed = self.size[0] * self.size[1] * rates.BYTES_PER_PIXEL[self.run.config.pool.image_format]
        if probed is not None:
            return stage.unit_bytes(self.model, probed)
        self.assumed_image_bytes |= stage.unit_bytes(self.model, 1.0) != stage.unit_bytes(self.model, 0.0)
        return stage.unit_bytes(self.model, assumed)

    @property
    def advice(self) -> list[str]:
        """What the probes found to be faster."""
        return [probe.advice for probe in self._probes.values() if probe and probe.advice]

    # -- rates: one for each kind of work, from a probe or from existing shards

    def _rate(self, stage: Stage, existing: Sequence[ShardManifest]) -> Rate | None:
        """Seconds per unit; None without a measurement."""
        if self.with_probe and (probed := self._probe(stage)) is not None:
            return Rate(stage.images_per_unit * probed.seconds, f"a batch timed on {self.device_name}")
        key = (stage.work, stage.images_per_unit)
        rate = (rates.measured(existing, self.device_name) or self._rates.get(key)
                or rates.measured(stage.comparable(), self.device_name))
        if rate is None and (one := self._rates.get((stage.work, 1))) is not None:
            rate = one._replace(seconds=stage.images_per_unit * one.seconds)
        if rate is None and not stage.runs_on_workers:
            return Rate(0.0, "no model is needed")
        if rate is not None:
            self._rates[key] = rate
        return rate

    def _probe(self, stage: Stage) -> Probe | None:
        if stage.work not in self._probes:
            self._probes[stage.work] = stage.probe()
        return self._probes[stage.work]
