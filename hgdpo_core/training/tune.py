"""Tuning: cached latents in, a model in the store out. An existing model is not made again."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hgdpo_core.config import TrainingConfig
from hgdpo_core.config.base import content_hash
from hgdpo_core.devices import default_device, device_name
from hgdpo_core.models import Model, load_backbone
from hgdpo_core.models.fingerprints import fingerprint_path
from hgdpo_core.models.published import fetch_model, publish_model
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.storage import Store, scratch_folder
from hgdpo_core.storage.shards import ShardFolder, ShardManifest
from hgdpo_core.training.base import Hooks, TrainingResult
from hgdpo_core.training.checkpoints import Checkpoints
from hgdpo_core.training.loop import run_training
from hgdpo_core.training.objective import find_objective
from hgdpo_core.training.parts import LogRow
from hgdpo_core.training.processes import is_first_process
from hgdpo_core.training.trackers import check_tracker, tracked
from hgdpo_core.training.validation import Validation, ValidationGenerator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tuned:
    """A tuned model, its path and the log of its training."""

    model_id: str
    path: Path
    log: list[dict[str, float]]
    existing: bool

    @property
    def objective(self) -> str:
        """Name of the objective that trained it, which its id begins with."""
        return self.model_id.rpartition("-")[0]

    def applied_to(self, model: Model, weight: float) -> Model:
        """A LoRA's target with the LoRA at a weight."""
        return model.with_lora(self.path, weight)

    def as_target(self, model: Model) -> Model:
        """The fine-tuned model, whose folder holds every part, with the target's own text and precision settings."""
        return replace(model, path=self.path, fingerprint=fingerprint_path(self.path), vae=None, configs=None,
                       prediction_type=None)


def tune(kind: str, model: Model, latents: ShardFolder, indices: Sequence[int], config: TrainingConfig,
         triplets: str | None = None, *, validation: Validation | None = None, progress: Progress = silent,
         should_stop: ShouldStop = never_stop) -> Tuned:
    """Train by the objective of that name on shards of latents; the result is kept in `models/` of their store.

    `triplets`: key of what the latents were made of. With a `validation`, images every `validation_every` steps are
    kept beside the result.
    """
    training, store = find_objective(kind), latents.store
    model_id = tuned_id(kind, model.identity(), latents, indices, config)
    if existing := find_tuned(store, model_id):
        return existing
    check_tracker(config.tracker)
    samples = training.samples(latents, indices)
    training.require_fit(store, triplets, samples, indices, model, config)
    # The denoiser alone is moved, later and by each process to its own GPU: the rest would only take room there.
    backbone = load_backbone(model, "cpu", dtype="float32")
    validate, tracker = None, None
    if is_first_process():
        tracker = config.tracker
        if validation is not None and config.validation_every is not None:
            validate = ValidationGenerator(store, model_id, backbone, validation, config)
    objective, watch = training.prepare(backbone, model, config), training.watch(logger.warning)
    with tracked(tracker, store, model_id, config.model_dump(mode="json")) as track:
        def on_log(row: LogRow) -> None:
            watch(row)
            track(row)

        result = run_training(objective, samples, config, Checkpoints(store, f"models/{model_id}/checkpoints"),
                              Hooks(progress, should_stop, on_log, validate))
    if not is_first_process():  # which writes gigabytes of it, once
        return Tuned(model_id, Path(), result.log, existing=False)
    with scratch_folder() as folder:
        saved = training.save(backbone, folder, model_id)
        return _publish(model_id, folder, saved, model, config, latents, result)


def tuned_id(kind: str, identity: Mapping[str, Any], latents: ShardFolder, indices: Sequence[int],
             config: TrainingConfig, manifests: Mapping[int, ShardManifest] | None = None) -> str:
    """The id a tuned model will have: another model, other settings or other bytes to train on make another one."""
    manifests = latents.manifests() if manifests is None else manifests
    settings = {"model": identity, "latents": [manifests[index].sha256 for index in indices],
                "config": config.identity()}
    return f"{kind}-{content_hash(settings)}"


def find_tuned(store: Store, model_id: str) -> Tuned | None:
    """The tuned model of that id, None when it does not exist."""
    path = fetch_model(store, model_id)
    if path is None:
        return None
    log = store.read_object(f"models/{model_id}/log.json", rows=list[dict[str, float]])
    return Tuned(model_id, path, log["rows"], existing=True)


def _publish(model_id: str, folder: Path, kind: str, target: Model, config: TrainingConfig, latents: ShardFolder,
             result: TrainingResult) -> Tuned:
    store = latents.store
    store.write_json(f"models/{model_id}/log.json", {"rows": result.log})
    store.write_json(f"models/{model_id}/config.json", {
        "kind": kind, "latents": latents.key, "target": target.identity(), "config": config.model_dump(mode="json"),
        "global_batch": result.global_batch})
    path = publish_model(store, model_id, folder, {"kind": kind, "steps": result.steps, "seconds": result.seconds,
                                                   "device": device_name(default_device())})
    return Tuned(model_id, path, result.log, existing=False)
