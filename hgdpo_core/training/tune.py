"""Tuning as programs: cached latents in, a model in the store out. A model that is already there is found, not made."""

import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hgdpo_core.config import DpoConfig, SftConfig, TrainingConfig, content_hash
from hgdpo_core.errors import InputError
from hgdpo_core.models import Backbone, Model, default_device, device_name, load_backbone
from hgdpo_core.models.files import LORA_NAME
from hgdpo_core.models.fingerprints import fingerprint_path
from hgdpo_core.models.lora import write_kohya_lora
from hgdpo_core.models.published import fetch_model, publish_model
from hgdpo_core.progress import Progress, ShouldStop, never_stop, silent
from hgdpo_core.stages.triplets import model_fingerprint
from hgdpo_core.statistics.checks import CollapseWatch
from hgdpo_core.storage import Store, scratch_folder
from hgdpo_core.storage.shards import ShardFolder, ShardManifest
from hgdpo_core.training.checkpoints import Checkpoints
from hgdpo_core.training.data import LatentImages, LatentPairs
from hgdpo_core.training.dpo import train_dpo
from hgdpo_core.training.parts import LogRow, OnLog, TrainingResult
from hgdpo_core.training.processes import is_first_process
from hgdpo_core.training.sft import train_sft
from hgdpo_core.training.trackers import check_tracker, tracked
from hgdpo_core.training.validation import Validation, ValidationPainter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tuned:
    """A tuned model, where it lies and how its training went."""

    model_id: str
    path: Path
    log: list[dict[str, float]]
    found: bool

    def applied_to(self, model: Model, weight: float) -> Model:
        """A LoRA's target with the LoRA at a weight."""
        return model.with_lora(self.path, weight)

    def as_target(self, model: Model) -> Model:
        """The fine-tuned model, whose folder holds every part, with the target's own text and precision settings."""
        return replace(model, path=self.path, fingerprint=fingerprint_path(self.path), vae=None, configs=None)


def tune_target(store: Store, model: Model, latents: ShardFolder, config: SftConfig, *,
                validation: Validation | None = None, progress: Progress = silent,
                should_stop: ShouldStop = never_stop) -> Tuned:
    """SFT: fine-tune the network on the user's images; the result is a diffusers folder in `models/`.

    With a `validation`, pictures every `validation_every` steps are kept beside it.
    """
    indices = sorted(latents.manifests())
    model_id = tuned_id("sft", model.identity(), latents, indices, config)
    found = find_tuned(store, model_id)
    if found:
        return found
    check_tracker(config.tracker)
    device = _loading_device()
    backbone = load_backbone(model, device, dtype="float32")
    empty = load_backbone(model, device).text.encode_captions([""]).to("cpu", torch.float32)
    images = LatentImages(latents, indices)
    validate = _painter(store, model_id, backbone, validation, config)
    with _tracked(config, store, model_id) as track:
        result = train_sft(backbone.denoiser, backbone.schedule, images, config, empty, progress=progress,
                           checkpoints=Checkpoints(store, f"models/{model_id}/checkpoints"), should_stop=should_stop,
                           on_log=track, validate=validate)
    with scratch_folder() as folder:
        backbone.save(folder)
        return _publish(store, model_id, folder, "pipeline", model, config, latents, result)


def tune_lora(store: Store, model: Model, triplets: ShardFolder, latents: ShardFolder, indices: list[int],
              config: DpoConfig, *, validation: Validation | None = None, progress: Progress = silent,
              should_stop: ShouldStop = never_stop) -> Tuned:
    """Diffusion-DPO + SML: train a LoRA of the target on its triplets; the result is a diffusers LoRA folder.

    With a `validation`, pictures every `validation_every` steps are kept beside it.
    """
    model_id = tuned_id("dpo", model.identity(), latents, indices, config)
    found = find_tuned(store, model_id)
    if found:
        return found
    check_tracker(config.tracker)
    pairs = LatentPairs(latents, indices)
    if not len(pairs):
        raise InputError(f"{triplets.key} holds no triplet to train on: every pool was rejected, see its rejected/")
    if not config.allow_foreign_triplets:
        _refuse_foreign(triplets, indices, model)
    backbone = load_backbone(model, _loading_device(), dtype="float32")
    watch = CollapseWatch(logger.warning)
    validate = _painter(store, model_id, backbone, validation, config)
    with _tracked(config, store, model_id) as track:
        def on_log(row: LogRow) -> None:
            watch(row)
            track(row)

        result = train_dpo(backbone.denoiser, backbone.schedule, pairs, config, progress=progress,
                           checkpoints=Checkpoints(store, f"models/{model_id}/checkpoints"), should_stop=should_stop,
                           on_log=on_log, validate=validate)
    with scratch_folder() as folder:
        backbone.save_lora(folder)
        write_kohya_lora(folder / LORA_NAME, folder / f"{model_id}-kohya.safetensors")
        return _publish(store, model_id, folder, "lora", model, config, latents, result)


def _painter(store: Store, model_id: str, backbone: Backbone, validation: Validation | None,
             config: TrainingConfig) -> ValidationPainter | None:
    if validation is None or config.validation_every is None or not is_first_process():
        return None
    return ValidationPainter(store, model_id, backbone, validation, config)


def _tracked(config: TrainingConfig, store: Store, model_id: str) -> AbstractContextManager[OnLog]:
    return tracked(config.tracker if is_first_process() else None, store, model_id, config.model_dump(mode="json"))


def _loading_device() -> str:
    """Where a training loads its model; with many processes each moves its own copy to its own GPU later."""
    return "cpu" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else default_device()


def tuned_id(kind: str, identity: Mapping[str, Any], latents: ShardFolder, indices: list[int],
             config: TrainingConfig, manifests: Mapping[int, ShardManifest] | None = None) -> str:
    """The id a tuned model will have: another model, other settings or other bytes to train on make another one."""
    manifests = latents.manifests() if manifests is None else manifests
    settings = {"model": identity, "latents": [manifests[index].sha256 for index in indices],
                "config": config.identity()}
    return f"{kind}-{content_hash(settings)}"


def find_tuned(store: Store, model_id: str) -> Tuned | None:
    """The tuned model of that id, None when it is not there."""
    path = fetch_model(store, model_id)
    if path is None:
        return None
    return Tuned(model_id, path, store.read_json(f"models/{model_id}/log.json")["rows"], found=True)


def _publish(store: Store, model_id: str, folder: Path, kind: str, target: Model, config: TrainingConfig,
             latents: ShardFolder, result: TrainingResult) -> Tuned:
    if not is_first_process():
        return Tuned(model_id, folder, result.log, found=False)
    store.write_json(f"models/{model_id}/log.json", {"rows": result.log})
    store.write_json(f"models/{model_id}/config.json", {"kind": kind, "latents": latents.key,
                                                        "target": target.identity(),
                                                        "config": config.model_dump(mode="json"),
                                                        "global_batch": result.global_batch})
    path = publish_model(store, model_id, folder, {"kind": kind, "steps": result.steps, "seconds": result.seconds,
                                                   "device": device_name(default_device())})
    return Tuned(model_id, path, result.log, found=False)


def _refuse_foreign(triplets: ShardFolder, indices: list[int], model: Model) -> None:
    wanted = model_fingerprint(model.identity())
    for index in indices:
        made_by = set(triplets.read_columns(index, ["model_fingerprint"])["model_fingerprint"].to_pylist())
        if made_by - {wanted}:
            raise InputError(f"{triplets.key} was made by model {sorted(made_by - {wanted})[0][:12]}, the target is "
                             f"{wanted[:12]}: train the model that drew the pool, or set dpo.allow_foreign_triplets")
